// Log-odds of every amino acid against the residue that is there, from the logits of one unmasked pass.

/** Rows of the heat map, alike beside alike: aliphatic, aromatic, small and bent, polar, charged. */
export const ROWS = [..."AVILMCFWYGPSTNQHKRDE"];

/**
 * @returns {{score(position, letter): number|null, logProbability(position, letter): number, largest: number}}
 *   Positions from 0. Score is null where the residue is none of the 20 (X, B, Z, U, O, -).
 */
export function mutations(sequence, { logits, vocabulary }) {
  const column = new Map(vocabulary.map((letter, index) => [letter, index]));
  const logProbabilities = new Float64Array(logits.length);
  for (let i = 0; i < sequence.length; i++) {
    const row = logits.subarray(20 * i, 20 * i + 20);
    const top = row.reduce((a, b) => Math.max(a, b));
    const total = top + Math.log(row.reduce((sum, x) => sum + Math.exp(x - top), 0));
    row.forEach((x, k) => (logProbabilities[20 * i + k] = x - total));
  }
  const logProbability = (position, letter) => logProbabilities[20 * position + column.get(letter)];
  const score = (position, letter) => {
    const wild = column.get(sequence[position]);
    return wild === undefined ? null : logProbability(position, letter) - logProbabilities[20 * position + wild];
  };
  let largest = 0;
  for (let i = 0; i < sequence.length; i++) for (const a of ROWS) largest = Math.max(largest, Math.abs(score(i, a) ?? 0));
  return { score, logProbability, largest: Math.ceil(largest * 10) / 10 || 1 };
}
