// The page: what is asked, what is computed, what is shown.
import { encode, fetchModels, outputs } from "./api.js";
import { showClasses } from "./classes.js";
import { contactSettings, onContacts, showContacts, shownContacts, startContactView } from "./contact_view.js";
import { byId, calm, make } from "./dom.js";
import { attentionCsv, contactsCsv, filename, matrixCsv, mutationsCsv, save, toJson } from "./downloads.js";
import { asFasta, EXAMPLES } from "./examples.js";
import { MAX_RECORDS, MAX_TEXT, parse, tooLong } from "./fasta.js";
import { askForKey, currentKey } from "./key.js";
import { mutations } from "./mutations.js";
import { contactPicture, stripPicture } from "./picture.js";
import { showRecords } from "./records.js";
import { snippets } from "./snippets.js";
import { StripMap } from "./strip_map.js";
import { attentionStrip, mutationStrip } from "./strips.js";
import { showTabs } from "./tabs.js";
import { startTheme } from "./theme.js";

// Results kept at a time, as cells of contact maps: eight of the largest, thousands of small ones.
const KEPT_CELLS = 8 * 2048 ** 2;

let models = [];
let records = []; // {name, header, sequence, model, state, result, seconds, message}
let current = null;
let running = null; // AbortController of the run
let scores = null;
let mutationMap;
let attentionMap;
let classMap;

start();

async function start() {
  startTheme();
  startContactView();
  mutationMap = new StripMap(byId("mutation-map"), "Mutation heat map");
  classMap = new StripMap(byId("class-map"), "Classes of residues");
  attentionMap = new StripMap(byId("attention-map"), "Attention heat map");
  byId("examples").append(...EXAMPLES.map(exampleItem));
  byId("form").addEventListener("submit", (event) => (event.preventDefault(), submit()));
  byId("sequence").addEventListener("input", onTyping);
  byId("file").addEventListener("change", openFile);
  byId("sequence").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
  });
  byId("cancel").addEventListener("click", () => running?.abort());
  byId("model").addEventListener("change", showModel);
  byId("by-layer").addEventListener("change", () => attentionMap.update(attentionData()));
  byId("change-key").addEventListener("click", async () => (await askForKey(false)) && loadModels());
  onContacts(() => current && showCode());
  addSaves();
  await loadModels();
}

// -- the models ------------------------------------------------------------------------------------------------

async function loadModels() {
  try {
    models = await withKey(fetchModels);
  } catch (error) {
    say(error.message, true);
    return false;
  }
  const chosen = byId("model").value;
  byId("model").replaceChildren(...models.map(({ slug }) => make("option", { value: slug, selected: slug === chosen }, slug)));
  byId("about-server").textContent = models[0] ? `${software(models[0])}.` : "";
  byId("change-key").hidden = !currentKey();
  say("");
  showModel();
  return true;
}

function chosenModel() {
  return models.find(({ slug }) => slug === byId("model").value);
}

function showModel() {
  const model = chosenModel();
  if (!model) return;
  byId("model-about").textContent =
    `${model.layers} layers of width ${model.width}, ${model.precision} on ${model.backend}` +
    (model.synthetic ? ", synthetic weights" : "");
  byId("limit").textContent = model.max_length;
  byId("synthetic").hidden = !model.synthetic && !current?.model.synthetic;
  onTyping();
}

function software({ version }) {
  return `numpyesm ${version}`;
}

/** Do `work`; where the server asks for a key, ask the reader and do it again. */
async function withKey(work) {
  for (;;) {
    try {
      return await work();
    } catch (error) {
      if (error.kind !== "auth" || !(await askForKey(Boolean(currentKey())))) throw error;
    }
  }
}

// -- what is asked ---------------------------------------------------------------------------------------------

function exampleItem(example) {
  const button = make("button", { type: "button" }, example.label, " ", make("span", {}, String(example.sequence.length)));
  button.addEventListener("click", () => {
    byId("sequence").value = asFasta(example);
    onTyping();
    submit();
  });
  return make("li", {}, button);
}

/** The file's text into the box, where it can be seen and changed. */
async function openFile() {
  const [file] = byId("file").files;
  byId("file").value = "";
  if (!file) return;
  if (file.size > MAX_TEXT) {
    showProblems([tooLong(file.size)]);
    return;
  }
  byId("sequence").value = await file.text();
  onTyping();
}

function read() {
  return parse(byId("sequence").value, chosenModel()?.max_length);
}

let typing = 0;
/** What was understood, as it is typed; problems wait until somebody wants a result. */
function onTyping() {
  clearTimeout(typing);
  typing = setTimeout(() => {
    const { records: found, problems, note } = read();
    summarise(found, note);
    if (byId("problems").hasChildNodes()) showProblems(problems);
  }, 120);
}

function summarise(found, note) {
  byId("summary").textContent = summary(found, note);
}

function summary(found, note) {
  if (!found.length) return "";
  const lengths = found.map(({ sequence }) => sequence.length);
  const [least, most] = [Math.min(...lengths), Math.max(...lengths)];
  const range = least === most ? `${least}` : `${least} to ${most}`;
  const count = found.length === 1 ? "1 sequence" : `${found.length} sequences`;
  return `${count}, ${range} residue${most === 1 ? "" : "s"}${note ? ` (${note})` : ""}`;
}

function showProblems(problems) {
  const box = byId("sequence");
  box.setAttribute("aria-invalid", problems.length ? "true" : "false");
  const items = problems.slice(0, 10).map(({ message, start, end }) => {
    const item = make("li", {}, message);
    if (end > start) {
      const go = make("button", { type: "button", className: "link" }, "Show");
      go.addEventListener("click", () => (box.focus(), box.setSelectionRange(start, end)));
      item.append(" ", go);
    }
    return item;
  });
  if (problems.length > 10) items.push(make("li", {}, `and ${problems.length - 10} more.`));
  byId("problems").replaceChildren(...(items.length ? [make("ul", {}, ...items)] : []));
}

// -- what is computed ------------------------------------------------------------------------------------------

async function submit() {
  running?.abort();
  if (!models.length && !(await loadModels())) return;
  clearTimeout(typing); // what was just typed is read now, and must not take back what is said about it
  const { records: found, problems, note } = read();
  summarise(found, note);
  if (!found.length && !problems.length) problems.push({ message: "Paste a sequence, or pick an example.", start: 0, end: 0 });
  showProblems(problems);
  if (problems.length) {
    say("");
    byId("sequence").focus();
    return;
  }
  const model = chosenModel();
  records = found.slice(0, MAX_RECORDS).map((record) => ({ ...record, model, state: "waiting", result: null, message: "" }));
  await run(records, true);
}

/** Compute records one after the other; the first result is shown as soon as it is there. */
async function run(list, scroll) {
  const controller = new AbortController();
  running = controller;
  busy(true);
  let shown = false;
  try {
    for (const record of list) {
      await compute(record, controller.signal, list);
      if (record.state === "done" && !shown) {
        shown = true;
        show(record, scroll);
      }
      if (record.state === "failed" && record.stops) break;
    }
  } finally {
    for (const record of list) if (record.state === "waiting") record.state = "cancelled";
    if (running === controller) {
      running = null;
      busy(false);
      say(...outcome(list));
      showRefused(list);
      listRecords();
    }
  }
}

async function compute(record, signal, list) {
  if (signal.aborted) return;
  record.state = "running";
  listRecords();
  const started = performance.now();
  const place = list.length > 1 ? `${list.indexOf(record) + 1} of ${list.length}: ` : "";
  let detail = "";
  const tell = () => {
    const seconds = Math.floor((performance.now() - started) / 1000);
    byId("elapsed").textContent = [detail, seconds ? `${seconds} s` : ""].filter(Boolean).join(", ");
  };
  const onProgress = (words, changing = "") => {
    say(place + words);
    detail = changing;
    tell();
  };
  const clock = setInterval(tell, 1000);
  try {
    record.result = await withKey(() => encode(record.model, record.sequence, { signal, onProgress }));
    record.seconds = (performance.now() - started) / 1000;
    record.state = "done";
    makeRoom(record);
  } catch (error) {
    record.state = error.kind === "cancelled" ? "cancelled" : "failed";
    record.message = error.message;
    // What stops one record for a reason of its own does not stop the next.
    record.stops = error.kind !== "refused";
  } finally {
    clearInterval(clock);
    byId("elapsed").textContent = "";
  }
}

/** Forget the oldest results beyond what a browser holds easily; choosing one computes it again. */
function makeRoom(newest) {
  let cells = 0;
  for (const record of [newest, ...records.filter((r) => r !== newest && r !== current).reverse()]) {
    if (!record.result) continue;
    cells += record.result.length ** 2;
    if (cells > KEPT_CELLS) record.result = null;
  }
}

function outcome(list) {
  const failed = list.filter(({ state }) => state === "failed");
  const done = list.filter(({ state }) => state === "done");
  if (list.length === 1) {
    const [record] = list;
    if (record.state === "failed") return [record.stops ? record.message : "Not computed.", true];
    return [record.state === "done" ? `Done in ${record.seconds.toFixed(1)} s.` : "Cancelled.", false];
  }
  const text = `${done.length} of ${list.length} done${failed.length ? `, ${failed.length} failed` : ""}.`;
  return [failed[0]?.stops ? `${text} ${failed[0].message}` : text, failed.length > 0];
}

/** What the server did not take belongs under the input. */
function showRefused(list) {
  const refused = list.filter(({ state, stops }) => state === "failed" && !stops);
  if (refused.length) showProblems(refused.map(({ name, message }) => ({ message: `${name}: ${message}`, start: 0, end: 0 })));
}

function busy(on) {
  byId("cancel").hidden = !on;
  byId("progress").hidden = !on;
  byId("form").setAttribute("aria-busy", String(on));
  if (!on && document.activeElement === byId("cancel")) byId("compute").focus();
}

function say(text, wrong = false) {
  // Set only when it changes, or it is read out again.
  if (byId("status").textContent !== text) byId("status").textContent = text;
  byId("status").classList.toggle("wrong", wrong);
}

// -- what is shown ---------------------------------------------------------------------------------------------

function listRecords() {
  showRecords(records, current, choose);
}

async function choose(record) {
  if (record.result) show(record, false);
  else if (!running) await run([record], false);
}

function show(record, scroll) {
  current = record;
  const { name, header, sequence, result, model } = record;
  listRecords();
  byId("results").hidden = false;
  byId("skip-results").hidden = false;
  byId("synthetic").hidden = !model.synthetic && !chosenModel()?.synthetic;
  byId("result-title").textContent = name;
  const rest = header.startsWith(name) ? header.slice(name.length).trim() : "";
  byId("result-about").textContent =
    `${rest ? `${rest.length > 200 ? `${rest.slice(0, 199)}…` : rest}. ` : ""}${sequence.length} residue${sequence.length === 1 ? "" : "s"}, ${model.slug}` +
    `${model.synthetic ? " with synthetic weights" : ""}, ${record.seconds.toFixed(1)} s.`;
  byId("contacts-section").hidden = !result.contacts;
  byId("mutations-section").hidden = !result.logits;
  scores = result.logits && mutations(sequence, result);
  showClasses(sequence, result, model, classMap);
  if (result.contacts) showContacts(sequence, result);
  if (scores) mutationMap.show(mutationStrip(sequence, scores));
  attentionMap.show(attentionData());
  showCode();
  if (scroll) byId(records.length > 1 ? "records" : "results").scrollIntoView({ behavior: calm() ? "auto" : "smooth" });
}

function attentionData() {
  return attentionStrip(current.sequence, current.result, byId("by-layer").checked);
}

function showCode() {
  const { model, sequence } = current;
  const url = new URL(`api/v3/${encodeURIComponent(model.slug)}/encode/`, document.baseURI).href;
  const withKey = Boolean(currentKey());
  showTabs(snippets({ ...contactSettings(), ...model, url, sequence, withKey, include: outputs(model) }));
}

// -- what is taken along ---------------------------------------------------------------------------------------

function about(figure = "") {
  const { name, sequence, model } = current;
  return { figure, name, length: sequence.length, slug: model.slug, model: `${model.slug} (${model.precision})`,
    software: software(model), synthetic: model.synthetic };
}

function addSaves() {
  onClick(byId("save-json"), "json", () => toJson(about(), current.sequence, current.result));
  byId("contact-saves").append(
    saver("Picture (PNG)", "contacts.png", () => contactPicture(about("Contact map"), current.sequence, current.result, contactSettings(), shownContacts())),
    saver("These contacts (CSV)", "contacts.csv", () => contactsCsv(current.sequence, shownContacts())),
    saver("Whole map (CSV)", "contact-map.csv", () => matrixCsv(current.result)),
  );
  byId("mutation-saves").append(
    saver("Picture (PNG)", "mutations.png", () => stripPicture(about("Mutations"), mutationStrip(current.sequence, scores))),
    saver("Scores (CSV)", "mutations.csv", () => mutationsCsv(current.sequence, scores)),
  );
  byId("attention-saves").append(
    saver("Picture (PNG)", "attention.png", () => stripPicture(about("Attention"), attentionData())),
    saver("Values (CSV)", "attention.csv", () => attentionCsv(current.sequence, current.result)),
  );
}

function saver(label, ending, build) {
  return onClick(make("button", { type: "button" }, label), ending, build);
}

function onClick(button, ending, build) {
  button.addEventListener("click", async () => {
    const label = button.textContent;
    button.disabled = true;
    button.textContent = "Preparing …";
    try {
      save(await build(), filename(current.name, ending));
    } catch (error) {
      say(`The file could not be made: ${error.message}.`, true);
    } finally {
      button.disabled = false;
      button.textContent = label;
      button.focus();
    }
  });
  return button;
}
