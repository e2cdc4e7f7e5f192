// Making elements. Text goes in as text, never as HTML: names come from pasted FASTA.

/** The element with this id. */
export function byId(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`no element #${id}`);
  return element;
}

/** A new element: properties by name (`aria-…`, `data-…` and `role` as attributes), children as nodes or text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (/^(aria|data)-|^(role|for|scope)$/.test(name)) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Whether the reader asked for little motion. */
export function calm() {
  return matchMedia("(prefers-reduced-motion: reduce)").matches;
}

/** Let the browser paint and answer input before the work goes on. */
export function breathe() {
  return new Promise((resolve) => setTimeout(resolve));
}
