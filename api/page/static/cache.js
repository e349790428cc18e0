// What the cache holds, as a picture: a vessel for each tier, filled with the documents in it.

import { get } from "./api.js";
import { bytes, count, find, make, setText } from "./format.js";

const NAMES = { device: "Device", host: "RAM", disk: "Disk" };
const views = new Map(); // by tier

/** Loads and draws the tiers; returns the tier of each document, by its id. */
export async function loadCache() {
  const cache = await get("v1/cache");
  for (const [tier, held] of Object.entries(cache.tiers)) {
    if (held) draw(tier, held, cache.documents);
  }
  return new Map(cache.documents.map((file) => [file.id, file.tier]));
}

function draw(tier, held, files) {
  if (!views.has(tier)) addView(tier);
  const view = views.get(tier);
  const full = held.capacity_bytes ? held.bytes / held.capacity_bytes : 0;
  const parts = files
    .map((file) => ({ name: file.filename, tokens: tokensIn(tier, file) }))
    .filter((part) => part.tokens > 0 && full > 0)
    .map((part) => ({ ...part, share: part.tokens / held.capacity_tokens }));
  // Documents that begin alike share blocks, so together they may say more than there is.
  const told = parts.reduce((sum, part) => sum + part.share, 0);
  const scale = told > full ? full / told : 1;
  const spans = parts.map((part) => segment(part.share * scale, `${part.name}: ${count(part.tokens)} tokens`));
  const rest = full - told * scale;
  if (rest > 0.0005) spans.push(segment(rest, "conversations and prompts", "rest"));
  view.vessel.replaceChildren(...spans);
  const percent = full > 0 && full < 0.01 ? "under 1" : Math.round(100 * full);
  view.vessel.setAttribute("aria-label", `${NAMES[tier]}: ${percent}% full`);
  setText(view.fill, `${percent}%`);
  const facts = [`${bytes(held.bytes)} of ${bytes(held.capacity_bytes)}`];
  facts.push(`room for ${count(held.capacity_tokens)} tokens`);
  if (held.writes_off) facts.push("nothing is written: see the log");
  setText(view.facts, facts.join(" · "));
}

function tokensIn(tier, file) {
  if (tier === "disk") return file.durable_tokens;
  return file.tier === tier ? file.tokens : 0;
}

function segment(share, title, className = "part") {
  const element = make("span", { className, title });
  element.style.setProperty("width", `${100 * share}%`);
  return element;
}

function addView(tier) {
  const view = {
    fill: make("span", { className: "fill" }),
    vessel: make("div", { className: `vessel ${tier}`, role: "img" }),
    facts: make("p", { className: "facts" }),
  };
  const head = make("div", { className: "head" },
    make("span", { className: "name", text: NAMES[tier] }), view.fill);
  find("tiers").append(make("div", { className: "tier" }, head, view.vessel, view.facts));
  views.set(tier, view);
}
