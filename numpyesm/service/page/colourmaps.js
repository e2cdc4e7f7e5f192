// Colour tables. Made along straight lines of CIELAB lightness, so that equal steps of value look equal, and told apart
// by lightness alone, so that colour-blind readers and grey printers lose nothing. 33 colours each, 256 by interpolation.
// Sequential: the page's ground to its opposite. Diverging: orange below zero, blue above, the ground at zero.

const TABLES = {
  sequentialLight:
    "f5f9f6e9f3ecddede2d1e7d9c4e1d1b7dbc9aad5c19ccfbb8dc9b77dc3b36dbdb05bb7ad46b1ab2daaaa15a3a7009ca50494a0" +
    "028c9c048497007d9301758f006e8b016686005f8203587e00507a004976014272003b6e00336c0b2c6516245d1c1c55",
  sequentialDark:
    "161b2917213315273d112e48073452003b5b00426100496703506c005771025e7601657b036d80007485007c8a03838e008b93" +
    "029397099b9a01a39d13ab9e2cb39d3fba9c50c19a61c89872cf9683d69496dc93a8e293bae893cced93def295f0f898",
  divergingLight:
    "932c009b3b0ea3481baa5528b26134b96d41c07a4fc7865dcd926bd49e7adaab89e0b79ae5c4aaebd0bbf0ddcef4e9e1f6f6f6" +
    "e0edf5cde3f2bad9eea7cfeb95c5e783bbe371b0df5da6db499cd63091d20787cc007cc10271b40366a8045c9b00528f",
  divergingDark:
    "ffb781ffa763f09d5ee19359d28a55c48050b5774ca76e479865438a5c3f7c543b6e4b37604333523c2f44342b352d28262626" +
    "292f362b39452d43552d4d642c57742a6284256d941c78a30784b3048fc1009bce09a6db06b2e902bef635c9ff6bd3ff",
};

/** 256 colours, [r, g, b] each. */
function table(name) {
  const hex = TABLES[name];
  const anchors = Array.from({ length: hex.length / 6 }, (_, i) =>
    [0, 2, 4].map((k) => parseInt(hex.slice(6 * i + k, 6 * i + k + 2), 16)),
  );
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (anchors.length - 1);
    const low = Math.min(Math.floor(at), anchors.length - 2);
    return anchors[low].map((c, k) => Math.round(c + (at - low) * (anchors[low + 1][k] - c)));
  });
}

/** Everything a figure needs to know of colours. */
function palette(dark) {
  const ink = dark
    ? { ground: "#161b29", text: "#e7ebf1", soft: "#a3adbb", line: "#3d4658", none: "#3a4150", cursor: "#ffb781" }
    : { ground: "#ffffff", text: "#16202b", soft: "#56626f", line: "#c3cbd3", none: "#d8dce0", cursor: "#b03a00" };
  return {
    ...ink,
    sequential: table(dark ? "sequentialDark" : "sequentialLight"),
    diverging: table(dark ? "divergingDark" : "divergingLight"),
  };
}

export const LIGHT = palette(false);
export const DARK = palette(true);

/** Index into a table for a value between `low` and `high`; what lies outside takes the end's colour. */
export function shade(value, low, high) {
  const t = high > low ? (value - low) / (high - low) : 0;
  return Math.max(0, Math.min(255, Math.round(t * 255)));
}

export function css([r, g, b]) {
  return `rgb(${r},${g},${b})`;
}
