// The list of sequences, where there are several.
import { byId, make } from "./dom.js";

const STATES = { waiting: "waiting", running: "computing …", done: "", failed: "", cancelled: "not computed" };

export function showRecords(records, current, choose) {
  const nav = byId("records");
  nav.hidden = records.length < 2;
  if (nav.hidden) return;
  const focused = [...nav.querySelectorAll("button")].indexOf(document.activeElement);
  byId("record-list").replaceChildren(
    ...records.map((record) => {
      const state = record.state === "failed" ? record.message : STATES[record.state];
      const button = make(
        "button",
        { type: "button", className: record.state, title: record.header },
        make("span", { className: "record-name" }, record.name),
        make("span", { className: "record-length" }, String(record.sequence.length)),
        ...(state ? [make("span", { className: "record-state" }, state)] : []),
      );
      if (record === current) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => choose(record));
      return make("li", {}, button);
    }),
  );
  // The list was made anew: keep the reader's place in it.
  if (focused >= 0) nav.querySelectorAll("button")[focused]?.focus();
}
