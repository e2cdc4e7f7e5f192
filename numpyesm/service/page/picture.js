// Figures as PNG files, on white, with a title that says what they are: sequence, model, and whether the weights are
// synthetic.
import { LIGHT } from "./colourmaps.js";
import { colour, drawContactMap, enlarge, layout, rasterise } from "./contact_map.js";
import { FONT, LEGEND_HEIGHT, prepare } from "./figure.js";
import { legendOf, paintStrip, STRIP_HEIGHT } from "./strip_map.js";

// Safari draws nothing on canvases wider than this.
const WIDEST = 16_000;
const PAD = 20;
const TITLE = 46;

export function contactPicture(about, sequence, result, settings, pairs) {
  // At least one pixel a cell: nothing of a large map is lost in the file.
  const scale = 2;
  const width = Math.max(560, Math.ceil(result.length / scale) + 60);
  const place = layout(sequence.length, width, scale, width);
  const raster = rasterise(result, place.pixels, settings);
  if (settings.split) enlarge(raster, place.pixels, result.length, pairs, 4 * scale);
  const image = colour(raster, place.pixels, LIGHT);
  const whole = document.createElement("canvas");
  const figure = document.createElement("canvas");
  drawContactMap(prepare(figure, place.width, place.height, scale), place, image, { sequence, palette: LIGHT });
  const context = frame(whole, about, place.width, place.height, scale);
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.drawImage(figure, PAD * scale, (PAD + titleHeight(about)) * scale);
  return toBlob(whole);
}

export function stripPicture(about, data) {
  const column = Math.max(3, Math.min(14, Math.floor((WIDEST / 2 - 200) / data.sequence.length)));
  const content = data.left + data.sequence.length * column + 2;
  const scale = (Math.max(content, 480) + 2 * PAD) * 2 <= WIDEST ? 2 : 1;
  const height = STRIP_HEIGHT(data.rows.length);
  const canvas = document.createElement("canvas");
  const context = frame(canvas, about, Math.max(content, 480), height + LEGEND_HEIGHT + 6, scale);
  context.translate(PAD, PAD + titleHeight(about));
  paintStrip(context, data, { palette: LIGHT, width: content, column });
  legendOf(context, data, LIGHT, data.left, height + 6, Math.min(300, Math.max(content, 480) - data.left));
  return toBlob(canvas);
}

function titleHeight({ synthetic }) {
  return TITLE + (synthetic ? 22 : 0);
}

/** White paper with the title; `width` and `height` are the figure's. */
function frame(canvas, about, width, height, scale) {
  const context = prepare(canvas, width + 2 * PAD, height + 2 * PAD + titleHeight(about), scale);
  context.fillStyle = LIGHT.ground;
  context.fillRect(0, 0, width + 2 * PAD, height + 2 * PAD + titleHeight(about));
  context.textBaseline = "alphabetic";
  context.textAlign = "left";
  context.fillStyle = LIGHT.text;
  context.font = `600 15px ${FONT}`;
  context.fillText(fit(context, `${about.figure}: ${about.name}`, width), PAD, PAD + 14);
  context.fillStyle = LIGHT.soft;
  context.font = `12px ${FONT}`;
  context.fillText(fit(context, `${about.length} residues, ${about.model}, ${about.software}`, width), PAD, PAD + 33);
  if (about.synthetic) {
    context.fillStyle = LIGHT.cursor;
    context.font = `600 13px ${FONT}`;
    context.fillText(fit(context, "SYNTHETIC WEIGHTS: random numbers that mean nothing", width), PAD, PAD + 54);
  }
  return context;
}

/** `text`, cut to fit `width`. */
function fit(context, text, width) {
  let letters = [...text].slice(0, 300);
  if (context.measureText(letters.join("")).width <= width) return letters.join("");
  while (letters.length && context.measureText(`${letters.join("")}…`).width > width) letters = letters.slice(0, -1);
  return `${letters.join("")}…`;
}

function toBlob(canvas) {
  return new Promise((resolve, reject) =>
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("the picture is too large for this browser"))), "image/png"),
  );
}
