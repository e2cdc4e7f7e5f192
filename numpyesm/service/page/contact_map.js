// Painting the contact map: L×L probabilities, one colour a pixel, whatever L is.
import { css, shade } from "./colourmaps.js";
import { drawLegend, FONT, LEGEND_HEIGHT, MONO, ticks } from "./figure.js";

const LARGEST_CELL = 44;
const LETTERS_FROM = 13;
const MANY = 20_000;

/** Where things go in a figure `width` CSS pixels wide, at `scale` device pixels each. */
export function layout(length, width, scale, tallest = 720) {
  const left = 44;
  const top = 6;
  const room = Math.min(width - left - 14, tallest, length * LARGEST_CELL);
  let pixels = Math.max(1, Math.floor(room * scale));
  // Cells of 1 to 4 screen pixels would come out unequal; make them whole. Smaller ones share a pixel.
  const perCell = pixels / length;
  if (perCell >= 1 && (perCell < 4 || scale < 2)) pixels = Math.floor(perCell) * length;
  const side = pixels / scale;
  return { left, top, side, pixels, scale, width, height: top + side + 40 + LEGEND_HEIGHT, cell: side / length };
}

/** The first and last cell that a pixel shows: one, or several where the map has more cells than the screen pixels. */
function cellsOf(pixel, pixels, length) {
  const first = Math.floor((pixel * length) / pixels);
  return [first, length <= pixels ? first : Math.max(first, Math.ceil(((pixel + 1) * length) / pixels) - 1)];
}

/** Indices into the colour table, pixels×pixels; where cells share a pixel the largest probability shows. */
export function rasterise({ contacts, length }, pixels, { split, threshold, separation }) {
  const spans = Array.from({ length: pixels }, (_, p) => cellsOf(p, pixels, length));
  const out = new Uint8Array(pixels * pixels);
  const least = Math.fround(threshold);
  for (let y = 0; y < pixels; y++) {
    const [i0, i1] = spans[y];
    for (let x = 0; x < pixels; x++) {
      const [j0, j1] = spans[x];
      let largest = 0;
      for (let i = i0; i <= i1; i++) {
        for (let j = j0; j <= j1; j++) {
          let p = contacts[i * length + j];
          if (split && i > j && (p < least || i - j < separation)) p = 0;
          if (p > largest) largest = p;
        }
      }
      out[y * pixels + x] = shade(largest, 0, 1);
    }
  }
  return out;
}

/** Make contacts below the diagonal at least `size` pixels large: one pixel of a map of 2048 is easily overlooked. */
export function enlarge(raster, pixels, length, pairs, size) {
  const cell = pixels / length;
  if (cell >= size || pairs.count > MANY) return;
  // Weakest first, so that the strongest lies on top.
  for (let k = pairs.count - 1; k >= 0; k--) {
    const [j, i, p] = pairs.at(k);
    const top = Math.max(0, Math.round((i + 0.5) * cell - size / 2));
    const left = Math.max(0, Math.round((j + 0.5) * cell - size / 2));
    for (let y = top; y < Math.min(pixels, top + size); y++) {
      for (let x = left; x < Math.min(y, left + size); x++) raster[y * pixels + x] = shade(p, 0, 1);
    }
  }
}

/** The raster in colours, as a canvas of its own. */
export function colour(raster, pixels, palette) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = pixels;
  const context = canvas.getContext("2d");
  const image = context.createImageData(pixels, pixels);
  const words = new Uint32Array(image.data.buffer);
  const packed = palette.sequential.map(([r, g, b]) => ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0);
  for (let i = 0; i < raster.length; i++) words[i] = packed[raster[i]];
  context.putImageData(image, 0, 0);
  return canvas;
}

/** The whole figure. `cursor` is [i, j] or null. */
export function drawContactMap(context, place, image, { sequence, palette, cursor = null }) {
  const { left, top, side, scale, width, height } = place;
  context.fillStyle = palette.ground;
  context.fillRect(0, 0, width, height);
  // Image pixels are screen pixels: place them on whole ones.
  context.save();
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(image, Math.round(left * scale), Math.round(top * scale));
  context.restore();
  context.strokeStyle = palette.line;
  context.lineWidth = 1;
  context.strokeRect(left - 0.5, top - 0.5, side + 1, side + 1);
  drawAxes(context, place, sequence, palette);
  if (cursor) drawCursor(context, place, cursor, palette);
  drawLegend(context, {
    x: left,
    y: top + side + 38,
    width: Math.min(220, width - left - 8),
    colours: palette.sequential,
    low: 0,
    high: 1,
    title: "Probability of contact",
    marks: [[0, "0"], [0.5, "0.5"], [1, "1"]],
    palette,
  });
}

function drawAxes(context, { left, top, side, cell }, sequence, palette) {
  const letters = cell >= LETTERS_FROM;
  context.textBaseline = "middle";
  if (letters) {
    context.font = `11px ${MONO}`;
    context.fillStyle = palette.text;
    [...sequence].forEach((letter, i) => {
      const at = (i + 0.5) * cell;
      context.textAlign = "right";
      context.fillText(letter, left - 5, top + at);
      context.textAlign = "center";
      context.fillText(letter, left + at, top + side + 10);
    });
  }
  context.font = `11px ${FONT}`;
  context.fillStyle = palette.soft;
  context.strokeStyle = palette.line;
  const away = letters ? 16 : 4;
  for (const i of ticks(sequence.length, cell, letters ? 20 : 44)) {
    const at = (i + 0.5) * cell;
    context.textAlign = "right";
    context.fillText(String(i + 1), left - away - 3, top + at);
    context.textAlign = "center";
    context.fillText(String(i + 1), left + at, top + side + away + 8);
    if (letters) continue;
    context.beginPath();
    context.moveTo(left - 1, top + at);
    context.lineTo(left - 5, top + at);
    context.moveTo(left + at, top + side + 1);
    context.lineTo(left + at, top + side + 5);
    context.stroke();
  }
}

function drawCursor(context, { left, top, side, cell }, [i, j], palette) {
  const x = left + j * cell;
  const y = top + i * cell;
  const half = cell / 2;
  context.strokeStyle = palette.cursor;
  context.lineWidth = 1;
  context.beginPath();
  // The lines stop short of the cell, so that its colour stays to be seen.
  const gap = Math.max(half, 3) + 1;
  for (const [a, b] of [[left, x + half - gap], [x + half + gap, left + side]]) {
    if (b > a) context.moveTo(a, y + half), context.lineTo(b, y + half);
  }
  for (const [a, b] of [[top, y + half - gap], [y + half + gap, top + side]]) {
    if (b > a) context.moveTo(x + half, a), context.lineTo(x + half, b);
  }
  context.stroke();
  context.lineWidth = 1.5;
  const box = Math.max(cell, 5) + 1.5;
  context.strokeRect(x + half - box / 2, y + half - box / 2, box, box);
}

/** The cursor's surroundings with their letters, for maps too fine to read. */
export function drawLoupe(context, { contacts, length }, sequence, [i, j], palette, cells, cell) {
  const margin = 18;
  const reach = (cells - 1) / 2;
  const size = margin + cells * cell + 1;
  context.fillStyle = palette.ground;
  context.fillRect(0, 0, size, size);
  context.font = `10px ${MONO}`;
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (let k = -reach; k <= reach; k++) {
    const at = margin + (k + reach + 0.5) * cell;
    context.fillStyle = k ? palette.soft : palette.cursor;
    if (sequence[i + k]) context.fillText(sequence[i + k], 9, at);
    if (sequence[j + k]) context.fillText(sequence[j + k], at, 9);
    for (let l = -reach; l <= reach; l++) {
      const inside = i + k >= 0 && i + k < length && j + l >= 0 && j + l < length;
      const value = inside ? contacts[(i + k) * length + j + l] : 0;
      context.fillStyle = inside ? css(palette.sequential[shade(value, 0, 1)]) : palette.none;
      context.fillRect(margin + (l + reach) * cell, margin + (k + reach) * cell, cell, cell);
    }
  }
  context.strokeStyle = palette.cursor;
  context.lineWidth = 1.5;
  context.strokeRect(margin + reach * cell - 0.75, margin + reach * cell - 0.75, cell + 1.5, cell + 1.5);
}
