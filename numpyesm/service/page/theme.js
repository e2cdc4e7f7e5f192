// Light and dark: what the system says, until the button says otherwise. Figures repaint on `onTheme`.
import { byId } from "./dom.js";

const system = matchMedia("(prefers-color-scheme: dark)");
const listeners = [];
const STORE = "numpyesm-theme";

export function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : system.matches;
}

export function onTheme(listener) {
  listeners.push(listener);
}

export function startTheme() {
  const stored = recall();
  if (stored) document.documentElement.dataset.theme = stored;
  const button = byId("theme");
  button.addEventListener("click", () => {
    const wanted = isDark() ? "light" : "dark";
    document.documentElement.dataset.theme = wanted;
    remember(wanted);
    changed();
  });
  system.addEventListener("change", changed);
  label();
}

function changed() {
  label();
  for (const listener of listeners) listener();
}

function label() {
  const other = isDark() ? "Light" : "Dark";
  byId("theme").textContent = other;
  byId("theme").setAttribute("aria-label", `${other} colours`);
}

// Storage may be forbidden (private windows); the page works without.
function recall() {
  try {
    const value = localStorage.getItem(STORE);
    return value === "dark" || value === "light" ? value : null;
  } catch {
    return null;
  }
}

function remember(value) {
  try {
    localStorage.setItem(STORE, value);
  } catch {
    // Chosen for this visit only.
  }
}
