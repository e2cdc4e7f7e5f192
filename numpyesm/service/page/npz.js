// NumPy's .npz in the browser: a zip of .npy arrays. Large maps arrive as the bytes they are drawn from instead of tens
// of megabytes of digits.

/** Arrays by name, each {shape, data}; data is a typed array, or a list of strings. */
export async function readNpz(buffer) {
  const arrays = {};
  for (const { name, bytes } of await unzip(buffer)) arrays[name.replace(/\.npy$/, "")] = readNpy(bytes);
  return arrays;
}

const KINDS = {
  f4: Float32Array, f8: Float64Array, i4: Int32Array, u4: Uint32Array, i2: Int16Array, u2: Uint16Array,
  i1: Int8Array, u1: Uint8Array, i8: BigInt64Array, u8: BigUint64Array,
};

/** One array of the .npy format, versions 1 to 3, little-endian, C order. */
export function readNpy(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (view.getUint32(0) !== 0x934e554d) throw new Error("not a .npy array");
  const wide = bytes[6] >= 2;
  const start = wide ? 12 : 10;
  const end = start + (wide ? view.getUint32(8, true) : view.getUint16(8, true));
  const header = new TextDecoder().decode(bytes.subarray(start, end));
  const kind = /'descr':\s*'([<|=])([a-zA-Z])(\d+)'/.exec(header);
  const shape = /'shape':\s*\(([^)]*)\)/.exec(header);
  if (!kind || !shape || !/'fortran_order':\s*False/.test(header)) throw new Error(`.npy header not understood: ${header}`);
  const sizes = shape[1].split(",").filter((part) => part.trim()).map(Number);
  const count = sizes.reduce((product, size) => product * size, 1);
  const [, , letter, width] = kind;
  if (letter === "U") return { shape: sizes, data: readStrings(view, end, count, Number(width)) };
  const Kind = KINDS[letter + width];
  if (!Kind) throw new Error(`.npy type ${letter}${width} not understood`);
  // slice: typed arrays want aligned memory, and an array should not keep the whole answer alive.
  const data = bytes.slice(end, end + count * Kind.BYTES_PER_ELEMENT).buffer;
  return { shape: sizes, data: new Kind(data) };
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

/** Entries of a zip, read through its central directory; stored or deflated. */
async function unzip(buffer) {
  const view = new DataView(buffer);
  let end = buffer.byteLength - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end--;
  if (end < 0) throw new Error("the answer is cut short (no zip directory)");
  const entries = [];
  let at = view.getUint32(end + 16, true);
  for (let left = view.getUint16(end + 10, true); left > 0; left--) {
    const method = view.getUint16(at + 10, true);
    const size = view.getUint32(at + 20, true);
    const nameLength = view.getUint16(at + 28, true);
    const local = view.getUint32(at + 42, true);
    const name = new TextDecoder().decode(new Uint8Array(buffer, at + 46, nameLength));
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const raw = new Uint8Array(buffer, start, size);
    entries.push({ name, bytes: method === 8 ? await inflate(raw) : raw });
    at += 46 + nameLength + view.getUint16(at + 30, true) + view.getUint16(at + 32, true);
  }
  return entries;
}

async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
