// Talks to the server: JSON calls, uploads with progress, streamed answers. One that is refused for
// want of a key waits until the user has given one, and is tried again.

const STORED_KEY = "longctx.key";

let keyAsker = async () => null; // replaced by key.js

export class Refusal extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
  }
}

export const storedKey = () => sessionStorage.getItem(STORED_KEY);

export function storeKey(key) {
  if (key) sessionStorage.setItem(STORED_KEY, key);
  else sessionStorage.removeItem(STORED_KEY);
}

/** Sets what is called with the key that was refused, and resolves to another or to null. */
export function onKeyWanted(asker) {
  keyAsker = asker;
}

export const get = async (path) => (await request("GET", path)).json();
export const getText = async (path) => (await request("GET", path)).text();
export const remove = async (path) => (await request("DELETE", path)).json();
export const post = async (path, body) => (await request("POST", path, { body })).json();

async function request(method, path, { body, signal } = {}) {
  for (;;) {
    const key = storedKey();
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method, headers, signal, body: JSON.stringify(body) });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal(0, { message: "the server does not answer" });
    }
    if (response.ok) return response;
    const refusal = new Refusal(response.status, await errorOf(response));
    if (!(response.status === 401 && (await anotherKey(key)))) throw refusal;
  }
}

async function anotherKey(refused) {
  return storedKey() !== refused || (await keyAsker(refused)) !== null;
}

async function errorOf(response) {
  try {
    return (await response.json()).error;
  } catch {
    return null;
  }
}

/** Uploads a file; `onProgress` gets the share that was sent. Resolves to the file's object. */
export async function upload(file, onProgress) {
  for (;;) {
    const key = storedKey();
    const { status, body } = await sendFile(file, key, onProgress);
    if (status >= 200 && status < 300) return body;
    if (!(status === 401 && (await anotherKey(key)))) throw new Refusal(status, body?.error);
  }
}

function sendFile(file, key, onProgress) {
  const form = new FormData();
  form.append("purpose", "user_data");
  form.append("file", file);
  return new Promise((resolve, reject) => {
    // fetch tells nothing of how much was sent
    const sending = new XMLHttpRequest();
    sending.open("POST", "v1/files");
    sending.responseType = "json";
    if (key) sending.setRequestHeader("Authorization", `Bearer ${key}`);
    sending.upload.addEventListener("progress", (event) => {
      if (event.lengthComputable) onProgress(event.loaded / event.total);
    });
    sending.addEventListener("load", () =>
      resolve({ status: sending.status, body: sending.response }),
    );
    sending.addEventListener("error", () =>
      reject(new Refusal(0, { message: "the connection broke; choose the file again" })),
    );
    sending.send(form);
  });
}

/** Yields the events of a streamed answer. Throws a Refusal for an error, also inside the stream. */
export async function* stream(path, body, signal) {
  const response = await request("POST", path, { body, signal });
  const decoder = new TextDecoder();
  let unread = "";
  for await (const chunk of chunks(response.body)) {
    unread += decoder.decode(chunk, { stream: true });
    const events = unread.split("\n\n");
    unread = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a ping
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const told = JSON.parse(data);
      if (told.error) throw new Refusal(response.status, told.error);
      yield told;
    }
  }
  throw new Refusal(0, { message: "the answer broke off: the server has gone away" });
}

async function* chunks(body) {
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal(0, { message: "the answer broke off: the server has gone away" });
  } finally {
    reader.releaseLock();
  }
}
