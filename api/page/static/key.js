// Asks for the API key where the server wants one. Several calls that are refused wait for one
// dialog; who cancels it is not asked again until the button is pressed.

import { onKeyWanted, storeKey, storedKey } from "./api.js";
import { find, tell } from "./format.js";

const dialog = find("key-dialog");
const input = find("key-input");

let waiting = null; // {promise, resolve} while the dialog is open
let declined = false;

function ask(refused) {
  find("key-button").hidden = false;
  if (waiting) return waiting.promise;
  if (declined) return Promise.resolve(null);
  return open(refused ? "The server does not accept this key." : null);
}

function open(fault) {
  let resolve;
  const promise = new Promise((settle) => (resolve = settle));
  waiting = { promise, resolve };
  tell(find("key-fault"), fault);
  input.value = "";
  dialog.showModal();
  return promise;
}

function finish(key) {
  const { resolve } = waiting ?? {};
  waiting = null;
  declined = key === null;
  if (dialog.open) dialog.close();
  resolve?.(key);
}

/** Prepares the dialog; `onChange` is called when a key was given by the button. */
export function startKeys(onChange) {
  onKeyWanted(ask);
  find("key-button").hidden = storedKey() === null;
  find("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = input.value.trim();
    if (!/^[!-~]+$/.test(key)) {
      tell(find("key-fault"), "A key has letters, digits and punctuation of ASCII, without spaces.");
      return;
    }
    storeKey(key);
    finish(key);
  });
  find("key-cancel").addEventListener("click", () => finish(null));
  dialog.addEventListener("cancel", (event) => {
    event.preventDefault();
    finish(null);
  });
  find("key-button").addEventListener("click", async () => {
    declined = false;
    if ((await open(null)) !== null) onChange();
  });
}
