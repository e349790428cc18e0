// The list of documents: uploads on their way, what is read and computed, and what may be chosen.

import { get, remove, upload } from "./api.js";
import { bytes, count, deleteButton, find, make, plural, seconds, setText, tell } from "./format.js";

const list = find("document-list");
const rows = new Map(); // by file id: the row's parts
const chosen = new Set();
let known = new Map(); // by file id: the file's object, with its tier
let onChosen = () => {};
let refresh = async () => {};

const documents = () => [...known.values()];

/** The chosen documents that can be asked about, in the order of the list. */
export const chosenDocuments = () =>
  documents().filter((file) => chosen.has(file.id));

export const isBusy = () =>
  documents().some((file) => ["queued", "processing"].includes(file.longctx.state));

/** Loads the list anew; `tiers`: by file id, the fastest tier that has it. */
export async function loadDocuments(tiers) {
  const { data, has_more: more } = await get("v1/files?limit=10000");
  find("more-documents").hidden = !more;
  known = new Map(data.map((file) => [file.id, { ...file, tier: tiers.get(file.id) ?? null }]));
  for (const id of chosen) if (!known.has(id)) chosen.delete(id);
  show();
}

function show() {
  for (const [id, row] of rows) {
    if (!known.has(id)) {
      row.item.remove();
      rows.delete(id);
    }
  }
  let before = null; // rows stay where they are, so that the focus does
  for (const file of [...known.values()].reverse()) {
    const row = rows.get(file.id) ?? addRow(file);
    update(row, file);
    if (row.item.nextSibling !== before || row.item.parentNode !== list) {
      list.insertBefore(row.item, before);
    }
    before = row.item;
  }
  find("no-documents").hidden = list.childElementCount > 0;
  onChosen();
}

function addRow(file) {
  const box = make("input", { type: "checkbox" });
  box.addEventListener("change", () => {
    if (box.checked) chosen.add(file.id);
    else chosen.delete(file.id);
    onChosen();
  });
  const row = {
    box,
    state: make("span", { className: "state" }),
    facts: make("p", { className: "facts" }),
    bar: make("progress", { max: "1", "aria-label": `${file.filename}: computed` }),
    fault: make("p", { className: "fault" }),
  };
  const name = make("label", { className: "name" }, box, make("span", { text: file.filename }));
  const erase = deleteButton(file.filename, () => deleteFile(file, row));
  const head = make("div", { className: "head" }, name, row.state, erase);
  row.item = make("li", { "data-id": file.id }, head, row.bar, row.facts, row.fault);
  rows.set(file.id, row);
  return row;
}

function update(row, file) {
  const { state, error, tokens, prefilled_tokens: done, eta_seconds: eta } = file.longctx;
  row.item.dataset.state = state;
  if (state === "error") chosen.delete(file.id);
  row.box.checked = chosen.has(file.id);
  row.box.disabled = state === "error";
  setText(row.state, state === "ready" ? tierWord(file) : state);
  const works = state === "queued" || state === "processing";
  row.bar.hidden = !works;
  if (works && tokens && done) row.bar.value = done / tokens;
  else row.bar.removeAttribute("value"); // it is being read
  setText(row.facts, facts(file, works && tokens ? { done, eta } : null));
  tell(row.fault, error);
}

function tierWord(file) {
  const words = { device: "on the device", host: "in RAM", disk: "on disk" };
  return words[file.tier] ?? "ready";
}

function facts(file, work) {
  const { tokens, sections, format, kv_bytes: kvBytes } = file.longctx;
  const told = [];
  if (work) told.push(`${count(work.done)} of ${plural(tokens, "token")}`);
  else if (tokens !== null) told.push(plural(tokens, "token"));
  if (work?.eta) told.push(`about ${seconds(work.eta)} left`);
  if (format === "pdf" && sections) told.push(plural(sections, "page"));
  told.push(bytes(file.bytes));
  if (!work && kvBytes) told.push(`${bytes(kvBytes)} in the cache`);
  return told.join(" · ");
}

async function deleteFile(file, row) {
  try {
    const receipt = await remove(`v1/files/${file.id}`);
    const erased = Object.values(receipt.longctx.erased ?? {});
    const total = erased.reduce((sum, tier) => sum + tier.bytes, 0);
    setText(find("document-note"), `${file.filename} is deleted, and ${bytes(total)} of cache.`);
    chosen.delete(file.id);
    await refresh();
  } catch (error) {
    tell(row.fault, `It could not be deleted: ${error.message}`);
  }
}

async function add(file) {
  const bar = make("progress", { max: "1", value: "0", "aria-label": `${file.name}: sent` });
  const facts = make("p", { className: "facts", text: `${bytes(file.size)} · being sent` });
  const fault = make("p", { className: "fault", role: "alert", hidden: "" });
  const dismiss = make("button", { className: "quiet", type: "button", text: "Dismiss", hidden: "" });
  dismiss.setAttribute("aria-label", `Dismiss ${file.name}`);
  const name = make("span", { className: "name", text: file.name });
  const head = make("div", { className: "head" }, name, dismiss);
  const item = make("li", { className: "upload" }, head, bar, facts, fault);
  dismiss.addEventListener("click", () => {
    item.remove();
    find("no-documents").hidden = list.childElementCount > 0;
  });
  list.prepend(item);
  find("no-documents").hidden = true;
  try {
    const added = await upload(file, (share) => (bar.value = share));
    chosen.add(added.id);
    item.remove();
    await refresh();
  } catch (error) {
    item.dataset.state = "error";
    bar.remove();
    facts.remove();
    dismiss.hidden = false;
    tell(fault, error.message);
  }
}

async function addAll(files) {
  for (const file of files) await add(file); // one after the other: the first is ready soonest
}

/** Prepares the drop zone. `reload` loads the list; `changed` is called when the choice changes. */
export function startDocuments(reload, changed) {
  refresh = reload;
  onChosen = changed;
  const input = find("file-input");
  const drop = find("drop");
  input.addEventListener("change", () => {
    const files = [...input.files];
    input.value = "";
    addAll(files);
  });
  let inside = 0; // enter and leave are told of every child, too
  const over = (by) => {
    inside += by;
    drop.classList.toggle("over", inside > 0);
  };
  document.addEventListener("dragenter", () => over(1));
  document.addEventListener("dragleave", () => over(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault(); // wherever it falls: the browser would leave the page for the file
    over(-inside);
    addAll([...event.dataTransfer.files]);
  });
}
