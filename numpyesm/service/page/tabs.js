// The code panel: one tab a language, and a button that copies.
import { byId, make } from "./dom.js";

let items = [];
let chosen = 0;

/** Show these {title, code}, the same language as before in front. */
export function showTabs(newItems) {
  items = newItems;
  const list = byId("code-tabs");
  if (list.childElementCount !== items.length) build(list);
  select(chosen, false);
}

function build(list) {
  list.replaceChildren(
    ...items.map(({ title }, index) => {
      const tab = make("button", { type: "button", role: "tab", id: `code-tab-${index}`, "aria-controls": "code-panel" }, title);
      tab.addEventListener("click", () => select(index, false));
      tab.addEventListener("keydown", (event) => {
        const goal = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: items.length - 1 }[event.key];
        if (goal === undefined) return;
        event.preventDefault();
        select((goal + items.length) % items.length, true);
      });
      return tab;
    }),
  );
  byId("copy").addEventListener("click", copy);
}

function select(index, focus) {
  chosen = index;
  [...byId("code-tabs").children].forEach((tab, k) => {
    tab.setAttribute("aria-selected", String(k === index));
    tab.tabIndex = k === index ? 0 : -1;
    if (focus && k === index) tab.focus();
  });
  byId("code-panel").setAttribute("aria-labelledby", `code-tab-${index}`);
  byId("code").textContent = items[index].code;
  byId("copied").textContent = "";
}

async function copy() {
  const { code } = items[chosen];
  try {
    await navigator.clipboard.writeText(code);
    byId("copied").textContent = "Copied.";
  } catch {
    // No clipboard outside https and loopback: mark the text, so that the keyboard can copy it.
    getSelection().selectAllChildren(byId("code"));
    byId("copied").textContent = "Selected; press Ctrl C to copy.";
  }
}
