// The service's answer, JSON or npz, as the one shape that the figures read:
// {contacts: Float32Array L·L, logits: Float32Array L·20, vocabulary: 20 letters, attentions: Float32Array layers·L, layers,
// classes: Float32Array labels or L·labels, labels: their names}
// with null for what was not asked for, because the weights have no such head.
import { readNpz } from "./npz.js";

export function readAnswer(buffer, contentType, length) {
  const result = /json/.test(contentType) ? fromJson(buffer) : fromNpz(buffer);
  const { contacts, logits, attentions, classes, labels } = result;
  const layers = attentions.length / length;
  if ((contacts?.length ?? length ** 2) !== length ** 2 || (logits?.length ?? 20 * length) !== 20 * length || layers % 1
    || (classes && ![1, length].includes(classes.length / labels.length))) {
    throw new Error("the answer does not fit the sequence");
  }
  return { ...result, layers, length };
}

function fromJson(buffer) {
  const [result] = JSON.parse(new TextDecoder().decode(buffer)).results;
  return {
    contacts: result.contacts ? flat(result.contacts) : null,
    logits: result.logits ? flat(result.logits) : null,
    attentions: flat(result.attentions),
    classes: result.classes ? Float32Array.from(result.classes.flat()) : null,
    labels: result.labels ?? [],
    vocabulary: result.vocab_tokens ?? [],
  };
}

function fromNpz(buffer) {
  const arrays = readNpz(buffer);
  // Outputs that have a size of their own each item are named contacts_0, contacts_1, …
  const named = (name) => arrays[`${name}_0`] ?? arrays[name] ?? null;
  return {
    contacts: named("contacts"),
    logits: named("logits"),
    attentions: named("attentions"),
    classes: named("classes"),
    labels: named("labels") ?? [],
    vocabulary: named("vocab_tokens") ?? [],
  };
}

function flat(rows) {
  const width = rows[0].length;
  const out = new Float32Array(rows.length * width);
  rows.forEach((row, i) => out.set(row, i * width));
  return out;
}
