// Results as files. Numbers are written with the nine digits that give back the very float32 of the model.
import { breathe, make } from "./dom.js";
import { ROWS } from "./mutations.js";

const ROWS_A_BREATH = 64;

export function number(value) {
  return String(Number(value.toPrecision(9)));
}

/** Hand a file to the reader. */
export function save(blob, filename) {
  const link = make("a", { href: URL.createObjectURL(blob), download: filename });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** A file name from a record's name, which may hold anything. */
export function filename(name, ending) {
  const safe = name.replace(/[^A-Za-z0-9._-]+/g, "_").replace(/^[._]+|_+$/g, "").slice(0, 60) || "sequence";
  return `${safe}.${ending}`;
}

/** The answer of the API for this sequence, with what it was asked. */
export async function toJson(about, sequence, result) {
  const { contacts, logits, attentions, vocabulary, length, layers, classes, labels } = result;
  const head = {
    name: about.name,
    model: about.slug,
    synthetic_weights: about.synthetic,
    software: about.software,
    sequence,
  };
  const parts = [JSON.stringify(head).slice(0, -1), ',"results":[{"sequence_index":0'];
  if (contacts) await addMatrix(parts, "contacts", contacts, length, length);
  if (logits) {
    await addMatrix(parts, "logits", logits, length, 20);
    parts.push(`,"vocab_tokens":${JSON.stringify(vocabulary)}`);
  }
  await addMatrix(parts, "attentions", attentions, layers, length);
  if (classes?.length === labels.length) parts.push(`,"classes":[${Array.from(classes, number).join(",")}]`);
  else if (classes) await addMatrix(parts, "classes", classes, length, labels.length);
  if (classes) parts.push(`,"labels":${JSON.stringify(labels)}`);
  parts.push("}]}\n");
  return new Blob(parts, { type: "application/json" });
}

async function addMatrix(parts, name, values, rows, columns) {
  parts.push(`,"${name}":`);
  for (let r = 0; r < rows; r++) {
    const row = Array.from(values.subarray(r * columns, (r + 1) * columns), number);
    parts.push(`${r ? "," : "["}[${row.join(",")}]`);
    if (r % ROWS_A_BREATH === ROWS_A_BREATH - 1) await breathe();
  }
  parts.push("]");
}

/** The predicted contacts, strongest first; positions from 1. */
export async function contactsCsv(sequence, pairs) {
  const lines = ["position_1,residue_1,position_2,residue_2,probability\n"];
  for (let k = 0; k < pairs.count; k++) {
    const [i, j, p] = pairs.at(k);
    lines.push(`${i + 1},${sequence[i]},${j + 1},${sequence[j]},${number(p)}\n`);
    if (k % 50_000 === 49_999) await breathe();
  }
  return csv(lines);
}

/** The whole map, L rows of L, without a header. */
export async function matrixCsv({ contacts, length }) {
  const lines = [];
  for (let i = 0; i < length; i++) {
    lines.push(`${Array.from(contacts.subarray(i * length, (i + 1) * length), number).join(",")}\n`);
    if (i % ROWS_A_BREATH === ROWS_A_BREATH - 1) await breathe();
  }
  return csv(lines);
}

/** One line a mutation; log-odds are empty where the residue is none of the 20. */
export async function mutationsCsv(sequence, scores) {
  const lines = ["position,residue,mutant,log_odds,log_probability\n"];
  for (let i = 0; i < sequence.length; i++) {
    for (const letter of ROWS) {
      const score = scores.score(i, letter);
      const odds = score === null ? "" : number(score);
      lines.push(`${i + 1},${sequence[i]},${letter},${odds},${number(scores.logProbability(i, letter))}\n`);
    }
  }
  return csv(lines);
}

/** One line a residue, one column a layer. */
export async function attentionCsv(sequence, { attentions, layers, length }) {
  const names = Array.from({ length: layers }, (_, l) => `layer_${l + 1}`);
  const lines = [`position,residue,${names.join(",")}\n`];
  for (let i = 0; i < length; i++) {
    const values = names.map((_, l) => number(attentions[l * length + i]));
    lines.push(`${i + 1},${sequence[i]},${values.join(",")}\n`);
  }
  return csv(lines);
}

function csv(lines) {
  return new Blob(lines, { type: "text/csv" });
}
