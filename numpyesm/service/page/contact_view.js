// The contact map as something to use: pointer, keys, threshold, the list of strongest contacts.
import { DARK, LIGHT } from "./colourmaps.js";
import { colour, drawContactMap, drawLoupe, enlarge, layout, rasterise } from "./contact_map.js";
import { PredictedContacts, SEPARATION } from "./contacts.js";
import { byId, make } from "./dom.js";
import { arrow, hideTip, hideUnlessTouched, prepare, showTip, speak } from "./figure.js";
import { isDark, onTheme } from "./theme.js";

const LOUPE_CELLS = 21;
const LOUPE_CELL = 10;
const LISTED = 20;
const DOT = 4;

let sequence = "";
let result = null;
let cursor = null;
let pairs = null;
let place = null;
let raster = null;
let image = null;
const listeners = [];

export function startContactView() {
  const canvas = byId("contact-map");
  for (const id of ["threshold", "separated", "split"]) byId(id).addEventListener("input", selectSoon);
  canvas.addEventListener("pointermove", (event) => event.pointerType !== "touch" && point(event));
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", hideUnlessTouched);
  canvas.addEventListener("keydown", onKey);
  canvas.addEventListener("focus", () => result && speak(describe()));
  new ResizeObserver(() => result && byId("results").hidden === false && resize()).observe(canvas.parentElement);
  onTheme(() => result && repaint());
}

/** Show another result. */
export function showContacts(newSequence, newResult) {
  [sequence, result] = [newSequence, newResult];
  cursor = null;
  place = null;
  const tiny = sequence.length === 1;
  byId("contact-map").setAttribute("aria-label", `Contact map, ${sequence.length} residues`);
  byId("loupe").hidden = sequence.length <= LOUPE_CELLS;
  byId("contact-readout").classList.toggle("unset", tiny);
  select();
  const [strongest] = pairs.count ? pairs.top(1) : strongestApart();
  moveTo(strongest ? [strongest[0], strongest[1]] : [0, sequence.length - 1], { quiet: true });
}

/** Called with the pairs whenever they change. */
export function onContacts(listener) {
  listeners.push(listener);
}

export function contactSettings() {
  return {
    threshold: Number(byId("threshold").value),
    separation: byId("separated").checked ? SEPARATION : 1,
    split: byId("split").checked,
  };
}

export function shownContacts() {
  return pairs;
}

function strongestApart() {
  return new PredictedContacts(result, 0, Math.min(SEPARATION, Math.max(1, sequence.length - 1))).top(1);
}

let waiting = 0;
/** One recount a frame, however fast the slider moves. */
function selectSoon() {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(select);
}

/** The threshold or the distance changed. */
function select() {
  if (!result) return;
  const { threshold, separation } = contactSettings();
  byId("threshold-value").textContent = threshold.toFixed(2);
  pairs = new PredictedContacts(result, threshold, separation);
  byId("contact-count").textContent = countText(separation);
  listStrongest();
  raster = null;
  resize();
  for (const listener of listeners) listener(pairs);
}

function countText(separation) {
  const length = sequence.length;
  if (length === 1) return "One residue: there is nothing it could touch.";
  if (length <= separation) {
    return `No two of ${length} residues are ${separation} apart. Clear the box above to see near ones.`;
  }
  const each = (pairs.count / length).toFixed(2);
  return `${pairs.count.toLocaleString("en")} contact${pairs.count === 1 ? "" : "s"}, ${each} per residue`;
}

function listStrongest() {
  const rows = pairs.top(LISTED).map(([i, j, p]) => {
    const go = make("button", { type: "button", className: "link" }, `${sequence[i]}${i + 1} – ${sequence[j]}${j + 1}`);
    go.addEventListener("click", () => moveTo([i, j]));
    return make("tr", {}, make("td", {}, go), make("td", {}, String(j - i)), make("td", {}, p.toFixed(3)));
  });
  const head = ["Residues", "Apart", "Probability"].map((text) => make("th", { scope: "col" }, text));
  byId("strongest").replaceChildren(
    rows.length
      ? make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows))
      : make("p", { className: "hint" }, "None at this threshold."),
  );
}

function resize() {
  const canvas = byId("contact-map");
  const width = Math.floor(canvas.parentElement.clientWidth);
  if (!width) return;
  const scale = devicePixelRatio || 1;
  const wanted = layout(sequence.length, width, scale);
  if (raster && place && wanted.pixels === place.pixels && wanted.width === place.width && place.scale === scale) return;
  if (!raster || wanted.pixels !== place?.pixels) {
    raster = rasterise(result, wanted.pixels, contactSettings());
    if (byId("split").checked) enlarge(raster, wanted.pixels, sequence.length, pairs, Math.round(DOT * scale));
  }
  place = wanted;
  repaint();
}

function repaint() {
  image = colour(raster, place.pixels, isDark() ? DARK : LIGHT);
  draw();
}

function draw() {
  const canvas = byId("contact-map");
  const palette = isDark() ? DARK : LIGHT;
  drawContactMap(prepare(canvas, place.width, place.height), place, image, { sequence, palette, cursor });
  // For those who look at the canvas from outside.
  Object.assign(canvas.dataset, { left: place.left, top: place.top, side: place.side, pixels: place.pixels });
  if (cursor && !byId("loupe").hidden) {
    const size = 18 + LOUPE_CELLS * LOUPE_CELL + 1;
    drawLoupe(prepare(byId("loupe"), size, size), result, sequence, cursor, palette, LOUPE_CELLS, LOUPE_CELL);
  }
}

function moveTo([i, j], { quiet = false } = {}) {
  const last = sequence.length - 1;
  cursor = [Math.max(0, Math.min(last, i)), Math.max(0, Math.min(last, j))];
  draw();
  readOut();
  if (!quiet) speak(describe());
}

function readOut() {
  const [i, j] = cursor;
  const p = result.contacts[i * sequence.length + j];
  byId("contact-readout").replaceChildren(
    make("p", { className: "pair" }, `${sequence[i]}${i + 1}`, make("span", {}, " – "), `${sequence[j]}${j + 1}`),
    make("p", { className: "value" }, probability(p)),
    make("p", { className: "hint" }, i === j ? "the residue itself" : `probability; ${Math.abs(i - j)} apart in the sequence`),
  );
}

function describe() {
  const [i, j] = cursor;
  const p = result.contacts[i * sequence.length + j];
  return `${sequence[i]}${i + 1} – ${sequence[j]}${j + 1}: probability ${probability(p)}`;
}

function probability(p) {
  return p >= 0.001 ? p.toFixed(3) : p.toExponential(1);
}

function point(event) {
  if (!place) return;
  const box = byId("contact-map").getBoundingClientRect();
  const j = Math.floor((event.clientX - box.left - place.left) / place.cell);
  const i = Math.floor((event.clientY - box.top - place.top) / place.cell);
  if (i < 0 || j < 0 || i >= sequence.length || j >= sequence.length) return hideTip();
  moveTo([i, j], { quiet: true });
  showTip(describe(), event.clientX, event.clientY);
}

function onKey(event) {
  if (!result || event.ctrlKey || event.altKey || event.metaKey) return;
  const [i, j] = cursor;
  const last = sequence.length - 1;
  const step = arrow(event);
  let goal = null;
  if (step) goal = [i + step[1], j + step[0]];
  else if (event.key === "Home") goal = [i, 0];
  else if (event.key === "End") goal = [i, last];
  else if (event.key === "PageUp") goal = [0, j];
  else if (event.key === "PageDown") goal = [last, j];
  else if (/^[np]$/i.test(event.key) && pairs.count) goal = neighbour(/n/i.test(event.key) ? 1 : -1);
  else if (event.key === "Escape") hideTip();
  if (!goal) return;
  event.preventDefault();
  moveTo(goal);
}

/** The contact before or after the cursor in the list, strongest first. */
function neighbour(step) {
  const [i, j] = cursor;
  const here = pairs.find(i, j);
  const next = here < 0 ? (step > 0 ? 0 : pairs.count - 1) : (here + step + pairs.count) % pairs.count;
  return pairs.at(next);
}
