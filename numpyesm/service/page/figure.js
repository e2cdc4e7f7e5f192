// What all figures share: crisp canvases, axis numbers, the colour bar, the label at the pointer.
import { byId } from "./dom.js";
import { css, shade } from "./colourmaps.js";

export const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif";
export const MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'Liberation Mono', monospace";
export const LEGEND_HEIGHT = 46;

/** Size a canvas in CSS pixels; its drawing context, scaled to the screen's own pixels. */
export function prepare(canvas, width, height, scale = devicePixelRatio || 1) {
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  return context;
}

/** Positions (from 0) that get a number: the first, then round ones at least `gap` pixels apart. */
export function ticks(length, pixelsPerResidue, gap = 46) {
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((s) => s * pixelsPerResidue >= gap) ?? 2000;
  const found = [];
  for (let n = step; n <= length; n += step) found.push(n - 1);
  if (!found.length || found[0] * pixelsPerResidue >= gap * 0.8) found.unshift(0);
  return [...new Set(found)];
}

/** A colour bar with its title above and numbers below; `marks` are [value, label]. */
export function drawLegend(context, { x, y, width, colours, low, high, title, marks, palette }) {
  context.font = `12px ${FONT}`;
  context.textBaseline = "alphabetic";
  context.textAlign = "left";
  context.fillStyle = palette.soft;
  context.fillText(title, x, y + 10);
  for (let px = 0; px < width; px++) {
    context.fillStyle = css(colours[shade(px, 0, width - 1)]);
    context.fillRect(x + px, y + 17, Math.min(1.5, width - px), 10);
  }
  context.strokeStyle = palette.line;
  context.lineWidth = 1;
  context.strokeRect(x + 0.5, y + 17.5, width - 1, 9);
  context.fillStyle = palette.soft;
  for (const [value, label] of marks) {
    const at = x + ((value - low) / (high - low)) * width;
    context.textAlign = at <= x + 1 ? "left" : at >= x + width - 1 ? "right" : "center";
    context.fillText(label, at, y + 41);
  }
}

/** Show `text` beside the pointer, within the window. */
export function showTip(text, clientX, clientY) {
  const tip = byId("tip");
  tip.textContent = text;
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(4, Math.min(clientX + 14, document.documentElement.clientWidth - width - 4));
  const top = clientY - height - 12 < 4 ? clientY + 18 : clientY - height - 12;
  tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(top)}px)`;
}

export function hideTip() {
  byId("tip").hidden = true;
}

/** A finger that lifts leaves what it pointed at; the tip stays until the page moves. */
export function hideUnlessTouched(event) {
  if (event.pointerType !== "touch") hideTip();
}

addEventListener("scroll", hideTip, { passive: true });

let pending = 0;
/** Read `text` out, once the keys rest. */
export function speak(text) {
  clearTimeout(pending);
  pending = setTimeout(() => (byId("spoken").textContent = text), 150);
}

/** How many to move for an arrow key: [right, down], or null for other keys. */
export function arrow(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return null;
  const step = event.shiftKey ? 10 : 1;
  return { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key] ?? null;
}
