// Questions and answers: streamed, with what each has cost and where it stands in the documents.

import { stream } from "./api.js";
import { chosenDocuments } from "./documents.js";
import { count, find, make, plural, seconds, setText, tell } from "./format.js";
import { findPlaces } from "./sources.js";

const TIER_WORDS = { device: "on the device", host: "in RAM", disk: "on disk" };

const turns = []; // {message, answer}: what was said, in order
let running = null; // the AbortController of the answer that is being written
let afterwards = async () => {};

export function showChosen() {
  const files = chosenDocuments();
  const text = files.length
    ? `About ${files.map((file) => file.filename).join(", ")}`
    : "About no document: choose one in the list, or ask without.";
  setText(find("chosen"), text);
}

/** Prepares the form; `after` is called when an answer has ended. */
export function startAsking(after) {
  afterwards = after;
  const question = find("question");
  find("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask(question.value.trim());
  });
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      find("ask").requestSubmit();
    }
  });
  find("stop").addEventListener("click", () => running?.abort());
}

async function ask(question) {
  if (running) return;
  if (!question) {
    tell(find("ask-fault"), "Write a question first.");
    find("question").focus();
    return;
  }
  tell(find("ask-fault"), null);
  find("question").value = "";
  const files = chosenDocuments();
  const follows = find("follow-up").checked;
  const earlier = follows ? turns : [];
  const said = new Set(earlier.flatMap((turn) => turn.files.map((file) => file.id)));
  const parts = files
    .filter((file) => !said.has(file.id)) // it stands in the conversation already
    .map((file) => ({ type: "file", file: { file_id: file.id } }));
  const message = { role: "user", content: [...parts, { type: "text", text: question }] };
  const turn = { message, files, answer: "" };
  const view = addTurn(question, files);
  running = new AbortController();
  setRunning(true);
  try {
    await write(turn, body(earlier, message), view, running.signal);
    turns.push(turn);
  } catch (error) {
    if (error.name === "AbortError") {
      tell(view.wait, "Stopped.");
      if (turn.answer) turns.push(turn);
    } else {
      tell(view.wait, null);
      tell(view.fault, error.message);
      if (!find("question").value) find("question").value = question; // to be asked again
    }
  } finally {
    running = null;
    view.article.setAttribute("aria-busy", "false");
    setRunning(false);
    await afterwards();
  }
}

function body(earlier, message) {
  const name = find("begin").value;
  const messages = earlier.flatMap((turn) => [
    turn.message,
    { role: "assistant", content: turn.answer },
  ]);
  return {
    messages: [...messages, message],
    stream: true,
    stream_options: { include_usage: true },
    return_progress: true,
    cache_explain: true,
    temperature: 0,
    ...(name ? { prompt_cache: { prompt: name } } : {}),
  };
}

async function write(turn, wanted, view, signal) {
  const began = performance.now();
  const cost = { firstToken: null, computed: null, found: null, usage: null, borrowed: 0 };
  for await (const event of stream("v1/chat/completions", wanted, signal)) {
    if (event.prompt_progress) showProgress(view, event.prompt_progress);
    if (event.longctx?.waiting_for) setText(view.wait, "The document is being read …");
    if (event.longctx?.computed_tokens !== undefined) cost.computed = event.longctx.computed_tokens;
    if (event.usage) cost.usage = event.usage;
    if (event.cache_explain) {
      cost.found = event.cache_explain.matched_tokens;
      cost.borrowed = event.cache_explain.borrowed_tokens;
    }
    const text = event.choices[0]?.delta?.content;
    if (!text) continue;
    if (cost.firstToken === null) {
      cost.firstToken = (performance.now() - began) / 1000;
      tell(view.wait, null);
    }
    turn.answer += text;
    view.text.append(text);
    follow();
  }
  tell(view.wait, turn.answer.trim() ? null : "The model had nothing to say.");
  showCost(view, cost);
  follow();
  await showPlaces(view, turn);
  follow();
}

function showProgress(view, progress) {
  const left = progress.total - progress.processed;
  const rest = progress.rest_ms ? `, about ${seconds(progress.rest_ms / 1000)}` : "";
  setText(view.wait, left > 0 ? `Reading: ${plural(left, "token")} left${rest} …` : "Thinking …");
}

function addTurn(question, files) {
  find("no-answers").hidden = true;
  const view = {
    wait: make("p", { className: "wait", text: "Thinking …" }),
    text: make("div", { className: "answer" }),
    fault: make("p", { className: "fault", role: "alert", hidden: "" }),
    places: make("div", { className: "places", hidden: "" }),
    cost: make("div", { className: "cost", hidden: "" }),
  };
  const about = files.map((file) => file.filename).join(", ");
  view.article = make(
    "article",
    { className: "turn", "aria-busy": "true" },
    make("div", { className: "question" }, make("p", { text: question }),
      ...(about ? [make("small", { text: about })] : [])),
    view.text,
    view.wait,
    view.fault,
    view.places,
    view.cost,
  );
  find("answers").append(view.article);
  view.article.scrollIntoView({ block: "nearest" });
  return view;
}

function setRunning(whether) {
  find("send").disabled = whether;
  find("stop").hidden = !whether;
}

/** Keeps the end of the answer in sight for somebody who is there already. */
function follow() {
  const answers = find("answers");
  const below = answers.scrollHeight - answers.scrollTop - answers.clientHeight;
  if (below < 160) answers.scrollTop = answers.scrollHeight;
}

function showCost(view, cost) {
  const figures = [];
  if (cost.firstToken !== null) figures.push([seconds(cost.firstToken), "to the first token"]);
  if (cost.computed !== null) figures.push([count(cost.computed), "tokens computed", "computed"]);
  for (const [tier, word] of Object.entries(TIER_WORDS)) {
    const found = cost.found?.[tier];
    if (found) figures.push([count(found), `found ${word}`, tier]);
  }
  if (cost.borrowed) figures.push([count(cost.borrowed), "reused from elsewhere", "device"]);
  const list = make("dl", {});
  for (const [figure, label, kind] of figures) {
    const mark = kind ? [make("i", { className: `mark ${kind}` })] : [];
    list.append(
      make("div", {}, make("dt", { text: label }), make("dd", {}, ...mark, figure)),
    );
  }
  view.cost.replaceChildren(share(cost), list);
  view.cost.hidden = figures.length === 0;
}

/** A bar of what was found and what was computed, of all tokens of prompt and answer. */
function share(cost) {
  const parts = Object.keys(TIER_WORDS).map((tier) => [tier, cost.found?.[tier] ?? 0]);
  parts.push(["device", cost.borrowed], ["computed", cost.computed ?? 0]);
  const total = parts.reduce((sum, [, tokens]) => sum + tokens, 0);
  const bar = make("div", { className: "share", "aria-hidden": "true" });
  for (const [kind, tokens] of parts) {
    if (!tokens) continue;
    const part = make("span", { className: kind });
    part.style.setProperty("flex-grow", String(tokens / total));
    bar.append(part);
  }
  return bar;
}

async function showPlaces(view, turn) {
  for (const file of turn.files) {
    let found = null;
    try {
      found = await findPlaces(file, turn.answer);
    } catch {
      continue; // the document was deleted meanwhile: the answer stands without its place
    }
    for (const place of found?.places ?? []) {
      const { before, match, after } = place.excerpt;
      view.places.append(
        make("figure", {},
          make("figcaption", {}, make("strong", { text: place.label }), ` of ${file.filename}`),
          make("blockquote", {}, before, make("mark", { text: match }), after)),
      );
    }
    if (found?.more) {
      view.places.append(
        make("p", { className: "hint", text: `and in ${plural(found.more, "other place")}` }),
      );
    }
  }
  view.places.hidden = view.places.childElementCount === 0;
}
