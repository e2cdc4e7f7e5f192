// What the two strip maps show.
import { ROWS } from "./mutations.js";

/** Log-odds of every amino acid at every position. */
export function mutationStrip(sequence, scores) {
  const limit = scores.largest;
  return {
    sequence,
    rows: ROWS,
    left: 26,
    table: "diverging",
    title: "Log-odds against the residue that is there",
    low: -limit,
    high: limit,
    marks: [[-limit, `−${limit.toFixed(1)} worse`], [0, "0"], [limit, `+${limit.toFixed(1)} better`]],
    value: (row, column) => scores.score(column, ROWS[row]),
    bounds: () => [-limit, limit],
    dot: (row, column) => ROWS[row] === sequence[column],
    describe(row, column) {
      const [wild, letter] = [sequence[column], ROWS[row]];
      const score = scores.score(column, letter);
      const alone = `log-probability of ${letter} ${signed(scores.logProbability(column, letter))}`;
      if (score === null) return `${wild}${column + 1} is none of the 20 amino acids: no log-odds; ${alone}`;
      if (wild === letter) return `${wild}${column + 1}, the residue that is there: 0; ${alone}`;
      return `${wild}${column + 1}${letter}: log-odds ${signed(score)}; ${alone}`;
    },
  };
}

/** Mean attention that each residue gets in each layer; layer 1 is the first. */
export function attentionStrip(sequence, { attentions, layers, length }, byLayer) {
  const all = extremes(attentions);
  const each = Array.from({ length: layers }, (_, l) => extremes(attentions.subarray(l * length, (l + 1) * length)));
  const [low, high] = byLayer ? [0, 1] : all;
  return {
    sequence,
    rows: Array.from({ length: layers }, (_, l) => `layer ${l + 1}`),
    left: 66,
    table: "sequential",
    title: byLayer ? "Attention, each layer from its least to its most" : "Attention (probability)",
    low,
    high: high > low ? high : low + 1e-9,
    marks: byLayer ? [[0, "least"], [1, "most"]] : [[low, brief(low)], [high, brief(high)]],
    value: (row, column) => attentions[row * length + column],
    bounds: (row) => (byLayer ? each[row] : all),
    dot: () => false,
    describe(row, column) {
      const value = attentions[row * length + column];
      return `${sequence[column]}${column + 1}, layer ${row + 1}: ${brief(value)} (${(value * length).toFixed(2)} times an even share)`;
    },
  };
}

/** What a head for residues says of each: a row for every label. */
export function classStrip(sequence, classes, labels, title) {
  const [low, high] = title === "Probability" ? [0, 1] : extremes(classes);
  const at = (row, column) => classes[column * labels.length + row];
  return {
    sequence,
    rows: labels,
    left: 12 + 8 * Math.min(16, Math.max(...labels.map((label) => label.length))),
    table: "sequential",
    title,
    low,
    high: high > low ? high : low + 1e-9,
    marks: [[low, brief(low)], [high, brief(high)]],
    value: at,
    bounds: () => [low, high],
    dot: () => false,
    describe: (row, column) => `${sequence[column]}${column + 1}, ${labels[row]}: ${brief(at(row, column))}`,
  };
}

function extremes(values) {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

function brief(value) {
  return Number(value.toPrecision(3)).toString();
}

function signed(value) {
  return `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;
}
