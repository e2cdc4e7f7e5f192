// A heat map of a few rows over the whole sequence: mutations and attention. Only the part in view is painted, so that
// 2048 columns cost no more than 60; where not all columns fit, a strip above shows the whole and takes one anywhere.
import { css, DARK, LIGHT, shade } from "./colourmaps.js";
import { make } from "./dom.js";
import { arrow, drawLegend, FONT, hideTip, hideUnlessTouched, LEGEND_HEIGHT, MONO, prepare, showTip, speak, ticks } from "./figure.js";
import { isDark, onTheme } from "./theme.js";

const ROW = 16;
const NARROWEST = 12;
const WIDEST = 26;
const HEAD = 20;
const FOOT = 20;
const OVERVIEW = 44;

/**
 * What a strip map shows:
 * {sequence, rows: labels, left: px for labels, table: "sequential"|"diverging", title, low, high, marks,
 *  value(row, column): number|null, bounds(row): [low, high], dot(row, column): boolean, describe(row, column): text}
 */
export class StripMap {
  #host;
  #data = null;
  #cursor = [0, 0];
  #column = NARROWEST;
  #box;
  #inner;
  #canvas;
  #overview;
  #legend;
  #readout;

  constructor(host, name) {
    this.#host = host;
    const keys = `${host.id}-keys`;
    this.#overview = make("canvas", { className: "overview", "aria-hidden": "true" });
    this.#canvas = make("canvas", { className: "strip" });
    this.#inner = make("div", { className: "strip-inner" }, this.#canvas);
    this.#box = make(
      "div",
      { className: "strip-box", tabIndex: 0, role: "application", "aria-label": name, "aria-roledescription": "heat map",
        "aria-describedby": keys },
      this.#inner,
    );
    this.#readout = make("p", { className: "strip-readout" });
    this.#legend = make("canvas", { className: "strip-legend", role: "img", "aria-label": "Colour scale" });
    const hint = make("p", { className: "keys", id: keys }, "Point at a cell, or focus the map and use the arrow keys (Shift: ten at a time); Home and End go to either end.");
    host.append(this.#overview, this.#box, this.#readout, this.#legend, hint);
    this.#listen();
  }

  show(data) {
    this.#data = data;
    this.#cursor = [0, 0];
    this.#box.scrollLeft = 0;
    this.resize();
    this.#readout.textContent = data.describe(0, 0);
  }

  /** The same data with other colours (another scale). */
  update(data) {
    this.#data = data;
    this.resize();
  }

  #listen() {
    const box = this.#box;
    new ResizeObserver(() => this.#data && this.resize()).observe(this.#host);
    onTheme(() => this.#data && this.resize());
    box.addEventListener("scroll", () => requestAnimationFrame(() => this.#data && this.#draw()), { passive: true });
    box.addEventListener("keydown", (event) => this.#onKey(event));
    box.addEventListener("focus", () => this.#data && speak(this.#data.describe(...this.#cursor)));
    this.#canvas.addEventListener("pointermove", (event) => event.pointerType !== "touch" && this.#point(event));
    this.#canvas.addEventListener("click", (event) => this.#point(event));
    this.#canvas.addEventListener("pointerleave", hideUnlessTouched);
    const jump = (event) => {
      const x = event.clientX - this.#overview.getBoundingClientRect().left - this.#data.left;
      const fraction = x / (this.#overview.clientWidth - this.#data.left);
      box.scrollLeft = fraction * this.#data.sequence.length * this.#column - (box.clientWidth - this.#data.left) / 2;
    };
    this.#overview.addEventListener("pointerdown", jump);
    this.#overview.addEventListener("pointermove", (event) => event.buttons && jump(event));
  }

  resize() {
    const { sequence, left, rows } = this.#data;
    const width = this.#host.clientWidth;
    if (!width) return;
    const fitting = Math.floor((width - left - 2) / sequence.length);
    this.#column = Math.max(NARROWEST, Math.min(WIDEST, fitting));
    const total = left + sequence.length * this.#column + 2;
    this.#inner.style.width = `${total}px`;
    this.#inner.style.height = `${HEAD + rows.length * ROW + FOOT}px`;
    this.#overview.hidden = total <= width;
    this.#draw();
    this.#drawLegend();
  }

  #draw() {
    const { sequence, left, rows } = this.#data;
    const palette = isDark() ? DARK : LIGHT;
    const width = Math.min(this.#box.clientWidth, left + sequence.length * this.#column + 2);
    const context = prepare(this.#canvas, width, HEAD + rows.length * ROW + FOOT);
    const scrolled = this.#box.scrollLeft;
    paintStrip(context, this.#data, { palette, width, column: this.#column, scrolled, cursor: this.#cursor });
    // For those who look at the canvas from outside.
    Object.assign(this.#canvas.dataset, { left, top: HEAD, column: this.#column, row: ROW, scrolled });
    if (!this.#overview.hidden) this.#drawOverview(palette, scrolled);
  }

  #drawOverview(palette, scrolled) {
    const { sequence, left, rows } = this.#data;
    const width = this.#host.clientWidth;
    const context = prepare(this.#overview, width, OVERVIEW);
    context.fillStyle = palette.ground;
    context.fillRect(0, 0, width, OVERVIEW);
    const room = width - left - 1;
    const height = OVERVIEW / rows.length;
    for (let x = 0; x < room; x++) {
      // One column of the sequence stands for all that share the pixel.
      const c = Math.floor((x * sequence.length) / room);
      for (let r = 0; r < rows.length; r++) {
        context.fillStyle = cellColour(this.#data, r, c, palette);
        context.fillRect(left + x, r * height, 1.5, height + 0.5);
      }
    }
    const scale = room / (sequence.length * this.#column);
    context.strokeStyle = palette.cursor;
    context.lineWidth = 2;
    context.strokeRect(left + scrolled * scale, 1, (this.#box.clientWidth - left) * scale, OVERVIEW - 2);
    context.fillStyle = palette.soft;
    context.font = `11px ${FONT}`;
    context.textAlign = "right";
    context.textBaseline = "middle";
    context.fillText("all", left - 6, OVERVIEW / 2);
  }

  #drawLegend() {
    const palette = isDark() ? DARK : LIGHT;
    const width = Math.min(300, this.#host.clientWidth);
    const context = prepare(this.#legend, width, LEGEND_HEIGHT);
    context.fillStyle = palette.ground;
    context.fillRect(0, 0, width, LEGEND_HEIGHT);
    legendOf(context, this.#data, palette, 0, 0, width);
  }

  #point(event) {
    const box = this.#canvas.getBoundingClientRect();
    const { sequence, rows, left, describe } = this.#data;
    const column = Math.floor((event.clientX - box.left - left + this.#box.scrollLeft) / this.#column);
    const row = Math.floor((event.clientY - box.top - HEAD) / ROW);
    if (event.clientX - box.left < left || row < 0 || row >= rows.length || column >= sequence.length) return hideTip();
    this.#cursor = [row, column];
    this.#draw();
    this.#readout.textContent = describe(row, column);
    showTip(describe(row, column), event.clientX, event.clientY);
  }

  #onKey(event) {
    const { sequence, rows, left, describe } = this.#data;
    const step = arrow(event);
    let [row, column] = this.#cursor;
    if (step) [row, column] = [row + Math.sign(step[1]), column + step[0]];
    else if (event.key === "Home") column = 0;
    else if (event.key === "End") column = sequence.length - 1;
    else return event.key === "Escape" ? hideTip() : undefined;
    event.preventDefault();
    row = Math.max(0, Math.min(rows.length - 1, row));
    column = Math.max(0, Math.min(sequence.length - 1, column));
    this.#cursor = [row, column];
    const room = this.#box.clientWidth - left;
    const at = column * this.#column;
    if (at < this.#box.scrollLeft) this.#box.scrollLeft = at;
    else if (at + this.#column > this.#box.scrollLeft + room) this.#box.scrollLeft = at + this.#column - room;
    this.#draw();
    this.#readout.textContent = describe(row, column);
    speak(describe(row, column));
  }
}

function cellColour(data, row, column, palette) {
  const value = data.value(row, column);
  return value === null ? palette.none : css(palette[data.table][shade(value, ...data.bounds(row))]);
}

/** The columns from `scrolled` px on, with letters above and numbers below. */
export function paintStrip(context, data, { palette, width, column, scrolled = 0, cursor = null }) {
  const { sequence, rows, left } = data;
  const bottom = HEAD + rows.length * ROW;
  context.fillStyle = palette.ground;
  context.fillRect(0, 0, width, bottom + FOOT);
  const first = Math.floor(scrolled / column);
  const last = Math.min(sequence.length - 1, Math.ceil((scrolled + width - left) / column));
  context.save();
  context.beginPath();
  context.rect(left, 0, width - left, bottom + FOOT);
  context.clip();
  context.textAlign = "center";
  context.textBaseline = "middle";
  for (let c = first; c <= last; c++) {
    const x = left + c * column - scrolled;
    for (let r = 0; r < rows.length; r++) {
      context.fillStyle = cellColour(data, r, c, palette);
      context.fillRect(x, HEAD + r * ROW, column, ROW);
      if (data.dot(r, c)) dot(context, x + column / 2, HEAD + (r + 0.5) * ROW, Math.min(2.2, column / 2.5), palette);
    }
    if (data.value(0, c) === null) strike(context, x, HEAD, column, rows.length * ROW, palette);
    if (column < 9) continue;
    context.font = `11px ${MONO}`;
    context.fillStyle = cursor?.[1] === c ? palette.cursor : palette.text;
    context.fillText(sequence[c], x + column / 2, HEAD / 2);
  }
  context.font = `11px ${FONT}`;
  context.fillStyle = palette.soft;
  for (const i of ticks(sequence.length, column, 60)) {
    if (i < first - 3 || i > last + 3) continue;
    const half = context.measureText(String(i + 1)).width / 2;
    const middle = left + (i + 0.5) * column - scrolled;
    context.fillText(String(i + 1), Math.max(middle, left - scrolled + half), bottom + FOOT / 2);
  }
  if (cursor) {
    const x = left + cursor[1] * column - scrolled;
    context.strokeStyle = palette.cursor;
    context.lineWidth = 2;
    context.strokeRect(x - 1, HEAD + cursor[0] * ROW - 1, column + 2, ROW + 2);
  }
  context.restore();
  context.textAlign = "right";
  context.font = `11px ${MONO}`;
  rows.forEach((label, r) => {
    context.fillStyle = cursor?.[0] === r ? palette.cursor : palette.soft;
    context.fillText(label, left - 7, HEAD + (r + 0.5) * ROW);
  });
}

function dot(context, x, y, radius, palette) {
  context.fillStyle = palette.text;
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
}

/** A column without values. */
function strike(context, x, y, width, height, palette) {
  context.strokeStyle = palette.soft;
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(x + width / 2, y + 3);
  context.lineTo(x + width / 2, y + height - 3);
  context.setLineDash([2, 4]);
  context.stroke();
  context.setLineDash([]);
}

export function legendOf(context, data, palette, x, y, width) {
  const { title, low, high, marks, table } = data;
  drawLegend(context, { x, y, width, colours: palette[table], low, high, title, marks, palette });
}

export const STRIP_HEIGHT = (rows) => HEAD + rows * ROW + FOOT;
