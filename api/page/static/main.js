// Starts the page, and keeps it true: often while something is being computed, else now and then.

import { get } from "./api.js";
import { showChosen, startAsking } from "./ask.js";
import { loadCache } from "./cache.js";
import { isBusy, loadDocuments, startDocuments } from "./documents.js";
import { count, find, setText, tell } from "./format.js";
import { startKeys } from "./key.js";
import { loadNeedles } from "./needles.js";
import { loadPrompts, promptsBusy, showPromptFiles, startPrompts } from "./prompts.js";

const BUSY_MS = 700;
const IDLE_MS = 5000;

let timer = null;
let loading = null;
let isKnown = false; // what is told once: the model, the needles

async function load() {
  try {
    if (!isKnown) await loadOnce();
    await loadDocuments(await loadCache());
    await loadPrompts();
    tell(find("document-fault"), null);
    health("ready");
  } catch (error) {
    if (error.status === 0) health("away");
    else if (error.status === 503) health("restarting");
    else health("refused");
    tell(find("document-fault"), `The list could not be loaded: ${error.message}.`);
  }
}

async function loadOnce() {
  const { data } = await get("v1/models");
  const { id, longctx } = data[0];
  setText(find("model"), `${id} · up to ${count(longctx.max_context_tokens)} tokens`);
  await loadNeedles();
  isKnown = true;
}

function health(state) {
  const words = {
    ready: "ready",
    away: "the server does not answer; trying again",
    restarting: "the engine is being restarted",
    refused: "refused",
  };
  find("health").dataset.state = state;
  setText(find("health"), words[state]);
}

/** Loads everything anew. One at a time: who asks meanwhile gets a load of its own after it. */
async function refresh() {
  clearTimeout(timer);
  while (loading) await loading;
  loading = load();
  await loading;
  loading = null;
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(refresh, isBusy() || promptsBusy() ? BUSY_MS : IDLE_MS);
}

startKeys(refresh);
startDocuments(refresh, () => {
  showChosen();
  showPromptFiles();
});
startAsking(refresh);
startPrompts(refresh);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) refresh();
});
await refresh();
