// What a fine-tuned classifier says: a table for the sequence, or a strip map with a row for each label.
import { byId, make } from "./dom.js";
import { classStrip } from "./strips.js";

/** Fill the section; `map` is the StripMap for heads that classify residues. */
export function showClasses(sequence, { classes, labels }, { head, problem_type }, map) {
  const value = problem_type === "regression" ? "Value" : "Probability";
  byId("classes-section").hidden = !classes;
  if (!classes) return;
  byId("class-table").hidden = head === "token";
  byId("class-map").hidden = head !== "token";
  if (head === "token") {
    map.show(classStrip(sequence, classes, labels, value));
    return;
  }
  const order = [...labels.keys()].sort((a, b) => classes[b] - classes[a]);
  const rows = order.map((i) => make("tr", {}, make("td", {}, labels[i]), make("td", {}, classes[i].toFixed(4))));
  const names = make("tr", {}, make("th", { scope: "col" }, "Label"), make("th", { scope: "col" }, value));
  byId("class-table").replaceChildren(make("table", {}, make("thead", {}, names), make("tbody", {}, ...rows)));
}
