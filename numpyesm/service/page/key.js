// The API key, where the server wants one: asked for in a dialog, kept in this tab only.
import { byId } from "./dom.js";

const STORE = "numpyesm-key";
let key = recall();

export function currentKey() {
  return key;
}

/** Ask for a key; resolves to whether one was given. `refused` says that the last one was not accepted. */
export function askForKey(refused) {
  const dialog = byId("key-dialog");
  byId("key-message").textContent = refused
    ? "The server did not accept this key. Check it and try again."
    : "This server wants a key; its owner can give you one. It is kept in this tab only, until you close it.";
  byId("key").value = "";
  byId("change-key").hidden = false;
  return new Promise((resolve) => {
    let given = false;
    byId("key-form").onsubmit = () => {
      // Header values are Latin-1 without line ends; anything else would make fetch throw.
      keep(byId("key").value.replace(/[^\x21-\x7e]/g, ""));
      given = true;
    };
    byId("key-close").onclick = () => dialog.close();
    dialog.onclose = () => resolve(given);
    if (!dialog.open) dialog.showModal();
  });
}

function keep(value) {
  key = value;
  try {
    sessionStorage.setItem(STORE, value);
  } catch {
    // Kept until the page is reloaded.
  }
}

function recall() {
  try {
    return sessionStorage.getItem(STORE) ?? "";
  } catch {
    return "";
  }
}
