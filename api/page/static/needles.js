// The heat map of the last `longctx bench niah`, where the server has its result.

import { get } from "./api.js";
import { count, find, make, setText } from "./format.js";

export async function loadNeedles() {
  let record;
  try {
    record = await get("v1/bench/niah");
  } catch {
    find("needles").hidden = true; // nobody has measured it, or it is gone
    return;
  }
  const cells = record.results.filter(
    (row) => row.metric === "exact match" && "length_tokens" in row && "depth_percent" in row,
  );
  if (cells.length === 0) return;
  find("heat").replaceChildren(table(cells));
  const { model, kv_codec: codec, kind } = cells[0];
  setText(
    find("needles-note"),
    `Percent of the needles (${kind}) that ${model} found with ${codec} KV, by the document's ` +
      "length in tokens and their depth in it.",
  );
  find("needles").hidden = false;
}

function table(cells) {
  const lengths = ordered(cells, "length_tokens");
  const depths = ordered(cells, "depth_percent");
  const head = make("tr", {}, make("th", { scope: "col", text: "depth" }),
    ...lengths.map((length) => make("th", { scope: "col", text: short(length) })));
  const rows = depths.map((depth) =>
    make("tr", {}, make("th", { scope: "row", text: `${count(depth)}%` }),
      ...lengths.map((length) => square(cells, length, depth))));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows));
}

const ordered = (cells, name) => [...new Set(cells.map((cell) => cell[name]))].sort((a, b) => a - b);

const short = (tokens) => (tokens % 1024 === 0 ? `${count(tokens / 1024)}k` : count(tokens));

function square(cells, length, depth) {
  const cell = cells.find((one) => one.length_tokens === length && one.depth_percent === depth);
  if (!cell) return make("td", {});
  const square_ = make("td", {
    text: `${Math.round(100 * cell.value)}`,
    title: `${Math.round(100 * cell.value)}% of ${count(cell.n)} needles`,
  });
  square_.style.setProperty("--share", `${Math.round(100 * cell.value)}%`);
  square_.classList.toggle("high", cell.value >= 0.5);
  return square_;
}
