// Stored prompts: listed, made, begun with, deleted.

import { get, post, remove } from "./api.js";
import { chosenDocuments } from "./documents.js";
import { count, deleteButton, find, make, plural, setText, tell } from "./format.js";

const TIER_WORDS = { device: "on the device", host: "in RAM", disk: "on disk" };

let shown = "";
let isComputing = false;
let refresh = async () => {};

export const promptsBusy = () => isComputing;

export function showPromptFiles() {
  const files = chosenDocuments();
  const text = files.length
    ? `With the chosen documents: ${files.map((file) => file.filename).join(", ")}.`
    : "Documents that are chosen in the list become part of it.";
  setText(find("prompt-files"), text);
}

export async function loadPrompts() {
  const { data } = await get("v1/prompt_cache/prompts");
  isComputing = data.some((prompt) => ["queued", "processing"].includes(prompt.state));
  const now = JSON.stringify(data);
  if (now === shown) return;
  shown = now;
  find("prompt-list").replaceChildren(...data.map(row));
  find("no-prompts").hidden = data.length > 0;
  const select = find("begin");
  const before = select.value;
  select.replaceChildren(
    make("option", { value: "", text: "no stored prompt" }),
    ...data.map((prompt) => make("option", { value: prompt.name, text: prompt.name })),
  );
  select.value = data.some((prompt) => prompt.name === before) ? before : "";
}

function row(prompt) {
  const fault = make("p", { className: "fault", hidden: "" });
  tell(fault, prompt.error);
  const use = make("button", { className: "quiet", type: "button", text: "Use" });
  use.setAttribute("aria-label", `Begin with ${prompt.name}`);
  use.addEventListener("click", () => {
    find("begin").value = prompt.name;
    find("question").focus();
  });
  const erase = deleteButton(prompt.name, async () => {
    try {
      await remove(`v1/prompt_cache/prompts/${encodeURIComponent(prompt.name)}`);
      await refresh();
    } catch (error) {
      tell(fault, `It could not be deleted: ${error.message}`);
    }
  });
  const state = prompt.state === "ready" ? (TIER_WORDS[prompt.tier] ?? "ready") : prompt.state;
  const facts = [plural(prompt.tokens, "token"), `used ${timesUsed(prompt.hits)}`];
  if (prompt.file_ids.length) facts.push(plural(prompt.file_ids.length, "document"));
  if (prompt.expires_at) facts.push(`until ${new Date(prompt.expires_at * 1000).toLocaleString()}`);
  return make(
    "li",
    { "data-state": prompt.state },
    make("div", { className: "head" },
      make("span", { className: "name", text: prompt.name }),
      make("span", { className: "state", text: state }), use, erase),
    make("p", { className: "facts", text: facts.join(" · ") }),
    fault,
  );
}

const timesUsed = (hits) => (hits === 1 ? "once" : `${count(hits)} times`);

/** Prepares the form; `reload` loads the list. */
export function startPrompts(reload) {
  refresh = reload;
  find("prompt-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const [name, system, ttl] = ["name", "system", "ttl"].map(
      (field) => find(`prompt-${field}`).value.trim(),
    );
    try {
      await post("v1/prompt_cache/prompts", {
        name,
        file_ids: chosenDocuments().map((file) => file.id),
        ...(system ? { system } : {}),
        ...(ttl ? { ttl } : {}),
      });
    } catch (error) {
      tell(find("prompt-fault"), error.message);
      return;
    }
    tell(find("prompt-fault"), null);
    find("prompt-form").reset();
    find("new-prompt").open = false;
    await refresh();
    find("begin").value = name;
  });
}
