// Which pairs count as contacts. A map of 2048 residues has two million pairs, and the threshold is dragged: pairs are
// kept as single numbers that sort by probability, and sorted only when somebody asks for the order.

export const SEPARATION = 6;

const bits = new Uint32Array(1);
const value = new Float32Array(bits.buffer);
const ONE = 0x3f800000; // float32 bits of 1; bits of numbers from 0 to 1 ascend with the numbers
const CELLS = 2 ** 22; // 2048 × 2048
const EASY = 20_000;

/** Pairs i < j (from 0) at or above the threshold, `separation` or more apart. */
export class PredictedContacts {
  #keys;
  #length;
  #sorted = false;

  constructor({ contacts, length }, threshold, separation) {
    // The map is float32: 0.7 there is a little less than 0.7 here.
    const least = Math.fround(threshold);
    const keys = new Float64Array((length * (length - 1)) / 2);
    let count = 0;
    for (let i = 0; i < length; i++) {
      for (let j = i + Math.max(1, separation); j < length; j++) {
        const p = contacts[i * length + j];
        if (!(p >= least)) continue;
        value[0] = p;
        keys[count++] = (ONE - bits[0]) * CELLS + i * length + j;
      }
    }
    this.#keys = keys.slice(0, count);
    this.#length = length;
  }

  get count() {
    return this.#keys.length;
  }

  /** The k-th strongest, [i, j, probability]; of equals the first in the sequence. */
  at(k) {
    if (!this.#sorted) this.#keys.sort();
    this.#sorted = true;
    return this.#decode(this.#keys[k]);
  }

  /** The n strongest, in order. */
  top(n) {
    if (this.#sorted || this.count <= EASY) return Array.from({ length: Math.min(n, this.count) }, (_, k) => this.at(k));
    const best = [];
    for (const key of this.#keys) {
      if (best.length === n && key > best[n - 1]) continue;
      const place = best.findIndex((other) => other > key);
      best.splice(place < 0 ? best.length : place, 0, key);
      if (best.length > n) best.pop();
    }
    return best.map((key) => this.#decode(key));
  }

  /** Place in the order of a pair, or -1. */
  find(i, j) {
    for (let k = 0; k < this.count; k++) {
      const [a, b] = this.at(k);
      if ((a === i && b === j) || (a === j && b === i)) return k;
    }
    return -1;
  }

  #decode(key) {
    const cell = key % CELLS;
    bits[0] = ONE - Math.floor(key / CELLS);
    return [Math.floor(cell / this.#length), cell % this.#length, value[0]];
  }
}
