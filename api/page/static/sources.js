// Where an answer stands in a document: which page, heading or file of it, found by its words.
//
// The model does not say where it read something. What it said is looked for in the text that it
// read, and shown only where it is found.

import { get, getText } from "./api.js";

const LARGEST_BYTES = 64_000_000; // of a file whose text is fetched to be looked through
const MOST_PLACES = 3;
const AROUND = 90; // characters shown on either side
const texts = new Map(); // by file id: text and sections, of the last few

/** Finds where the answer stands in the file: {places, more}, or null where that is not known. */
export async function findPlaces(file, answer) {
  if (!file.longctx.sections || file.bytes > LARGEST_BYTES) return null;
  if (!texts.has(file.id)) {
    const [text, sections] = await Promise.all([
      getText(`v1/files/${file.id}/text`),
      get(`v1/files/${file.id}/sections`),
    ]);
    if (texts.size >= 4) texts.delete(texts.keys().next().value);
    texts.set(file.id, { text, sections: sections.data });
  }
  const { text, sections } = texts.get(file.id);
  return placesIn(text, sections, answer);
}

/** The sections in which the answer's words stand; of many, the first and how many more. */
export function placesIn(text, sections, answer) {
  for (const phrases of candidates(answer)) {
    const found = new Map(); // by label of the section
    for (const phrase of phrases) {
      for (const match of text.matchAll(pattern(phrase))) {
        const section = sectionAt(sections, codePoints(text, match.index));
        if (section === null || found.has(section.label)) continue;
        const around = excerpt(text, match.index, match[0].length, section.label);
        found.set(section.label, { label: section.label, excerpt: around });
      }
    }
    if (found.size > 0) {
      const places = [...found.values()];
      return { places: places.slice(0, MOST_PLACES), more: Math.max(0, places.length - MOST_PLACES) };
    }
  }
  return { places: [], more: 0 };
}

/** What to look for, the most telling first: all of it, its sentences, its names and numbers. */
function candidates(answer) {
  const whole = trimmed(answer);
  const sentences = answer.split(/(?<=[.!?])\s+|\n+/).map(trimmed);
  const values = [
    ...[...answer.matchAll(/["“]([^"”]{3,})["”]/g)].map((match) => trimmed(match[1])),
    ...[...answer.matchAll(/[\p{L}\p{N}][\p{L}\p{N}.,:/-]*/gu)]
      .map((match) => trimmed(match[0]))
      .filter((word) => /\p{N}/u.test(word) && word.length >= 3),
  ];
  return [
    whole.length >= 2 && whole.length <= 400 ? [whole] : [],
    sentences.filter((sentence) => sentence.length >= 20),
    values,
  ].filter((phrases) => phrases.length > 0);
}

const trimmed = (text) => text.replace(/^[\s"“'`*]+|[\s"”'`*.,;:!?]+$/gu, "");

/** The phrase as whole words, whatever white space is between them. */
function pattern(phrase) {
  const words = phrase.split(/\s+/).map((word) => word.replace(/[\\^$.*+?()[\]{}|/-]/g, "\\$&"));
  return new RegExp(`(?<![\\p{L}\\p{N}])${words.join("\\s+")}(?![\\p{L}\\p{N}])`, "giu");
}

/** How many characters come before an index: the server counts characters, not UTF-16 units. */
function codePoints(text, index) {
  let pairs = 0;
  for (const _ of text.slice(0, index).matchAll(/[\uD800-\uDBFF][\uDC00-\uDFFF]/g)) pairs += 1;
  return index - pairs;
}

function sectionAt(sections, offset) {
  let low = 0;
  let high = sections.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sections[middle].offset <= offset) low = middle + 1;
    else high = middle;
  }
  return low === 0 ? null : sections[low - 1];
}

/** What stands around a match. A line such as `[page 7]` is where a section begins: not beyond it. */
function excerpt(text, index, length, label) {
  const clean = (part) => part.replace(/\s+/g, " ");
  let before = text.slice(Math.max(0, index - AROUND), index);
  let after = text.slice(index + length, index + length + AROUND);
  const head = before.lastIndexOf(`[${label}]`);
  const next = after.search(/\n\[[^\]\n]*(\]\n|$)/);
  before = head < 0 ? `…${clean(before)}` : clean(before.slice(head + label.length + 2)).trimStart();
  after = next < 0 ? `${clean(after)}…` : clean(after.slice(0, next)).trimEnd();
  return { before, match: clean(text.slice(index, index + length)), after };
}
