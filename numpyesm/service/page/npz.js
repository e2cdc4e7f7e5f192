// NumPy's .npz in the browser: a zip of .npy arrays. Large maps arrive as the bytes they are drawn from instead of tens
// of megabytes of digits.

/** Flat arrays by name: a Float32Array, or a list of strings. */
export function readNpz(buffer) {
  return Object.fromEntries(unzip(buffer).map(({ name, bytes }) => [name.replace(/\.npy$/, ""), readNpy(bytes)]));
}

/** One array of the .npy format, as the service writes it: version 1, little-endian, C order, float32 or strings. */
function readNpy(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (view.getUint32(0) !== 0x934e554d) throw new Error("not a .npy array");
  const end = 10 + view.getUint16(8, true);
  const header = new TextDecoder().decode(bytes.subarray(10, end));
  const kind = /'descr':\s*'<(f4|U)(\d*)'/.exec(header);
  const shape = /'shape':\s*\(([^)]*)\)/.exec(header);
  if (!kind || !shape || !/'fortran_order':\s*False/.test(header)) throw new Error(`.npy header not understood: ${header}`);
  const sizes = shape[1].split(",").filter((part) => part.trim()).map(Number);
  const count = sizes.reduce((product, size) => product * size, 1);
  if (kind[1] === "U") return readStrings(view, end, count, Number(kind[2]));
  // slice: typed arrays want aligned memory, and an array should not keep the whole answer alive.
  return new Float32Array(bytes.slice(end, end + count * 4).buffer);
}

/** Fixed-width UTF-32 strings, padded with zeros. */
function readStrings(view, start, count, width) {
  return Array.from({ length: count }, (_, i) => {
    let text = "";
    for (let k = 0; k < width; k++) {
      const code = view.getUint32(start + 4 * (i * width + k), true);
      if (code) text += String.fromCodePoint(code);
    }
    return text;
  });
}

/** Entries of a zip, which are stored, read through its central directory. */
function unzip(buffer) {
  const view = new DataView(buffer);
  let end = buffer.byteLength - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error("the answer is cut short (no zip directory)");
  const entries = [];
  let at = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    const size = view.getUint32(at + 20, true);
    const nameLength = view.getUint16(at + 28, true);
    const local = view.getUint32(at + 42, true);
    const name = new TextDecoder().decode(new Uint8Array(buffer, at + 46, nameLength));
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    entries.push({ name, bytes: new Uint8Array(buffer, start, size) });
    at += 46 + nameLength + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
  }
  return entries;
}
