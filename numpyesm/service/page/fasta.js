// Pasted text to records: FASTA, or bare sequences. Read as the Python library reads it (numpyesm/fasta.py): lower case
// is raised, blanks and one trailing * a record are dropped. Every problem names record and position, and knows
// where in the text it sits.

export const MAX_RECORDS = 100;
const ALLOWED = new Set("ACDEFGHIKLMNPQRSTVWYBXZUO-");
const EXPECTED = "expected one of ACDEFGHIKLMNPQRSTVWY, BXZUO or -";
export const MAX_TEXT = 4_000_000;
// The rule of numpyesm/fasta.py for lines without a header: what is one sequence, wrapped, and what is one a line.
const WRAPS = new Set([40, 50, 60, 70, 72, 75, 76, 80, 100, 120]);
const LEAST_WIDTH = 30; // of any other

/**
 * @returns {{records: {name, header, sequence}[], problems: {message, start, end}[], note: string}}
 *   `start` and `end` are offsets into `text`; `note` says how headerless lines were read.
 */
export function parse(text, maxLength = 2048) {
  if (text.length > MAX_TEXT) {
    return { records: [], problems: [tooLong(text.length)], note: "" };
  }
  const { drafts, problems, note } = split(text, maxLength);
  const records = drafts.map((draft, index) => finish(draft, index, maxLength, drafts.length, problems));
  if (records.length > MAX_RECORDS) {
    const message = `${records.length} sequences; the page takes ${MAX_RECORDS} at a time. ` +
      "For whole files use numpyesm embed on the command line.";
    problems.unshift({ message, start: 0, end: 0 });
  }
  return { records, problems, note };
}

/** The problem of a text that no page should take apart. */
export function tooLong(length) {
  const message = `This is ${(length / 1e6).toFixed(1)} million characters; the page takes 4 million. ` +
    "For whole files use numpyesm embed on the command line.";
  return { message, start: 0, end: 0 };
}

/** Records as headers and lines, each line with its offset. */
function split(text, maxLength) {
  const drafts = [];
  const problems = [];
  const bare = [];
  let draft = null;
  for (const { line, start } of lines(text)) {
    const content = line.trim();
    if (!content || content.startsWith(";")) continue;
    if (content.startsWith(">")) {
      const header = content.slice(1).trim();
      draft = { header, parts: [], start, end: start + line.length };
      drafts.push(draft);
    } else if (draft) draft.parts.push({ line, start });
    else bare.push({ line, start });
  }
  if (bare.length && drafts.length) {
    const { line, start } = bare[0];
    const message = "Sequence before the first > header: give it a header line of its own, or remove it.";
    problems.push({ message, start, end: start + line.length });
    return { drafts, problems, note: "" };
  }
  if (!bare.length) return { drafts, problems, note: "" };
  const wrapped = isWrapped(bare, maxLength);
  const groups = wrapped ? [bare] : bare.map((line) => [line]);
  const note = bare.length === 1 ? "" : wrapped ? "read as one wrapped sequence" : "one a line";
  for (const parts of groups) drafts.push({ header: "", parts, start: parts[0].start, end: parts[0].start });
  return { drafts, problems, note };
}

function isWrapped(bare, maxLength) {
  const widths = bare.map(({ line }) => line.replace(/\s/g, "").length);
  const [first] = widths;
  const last = widths.pop();
  if (!widths.length || last > first || !widths.every((w) => w === first)) return false;
  // Many lines of one width may be a library of peptides.
  if (WRAPS.has(first)) return last < first || first * widths.length + last <= maxLength;
  return first >= LEAST_WIDTH && widths.length > 1 && last < first;
}

function* lines(text) {
  // \r alone ends a line on old Macs; a byte order mark is nobody's residue.
  const pattern = /[^\r\n]+/g;
  for (let match; (match = pattern.exec(text)); ) {
    const mark = match[0].startsWith("\uFEFF") ? 1 : 0;
    yield { line: match[0].slice(mark), start: match.index + mark };
  }
}

/** One record, its problem (the first only) added to `problems`. */
function finish({ header, parts, start, end }, index, maxLength, count, problems) {
  const name = header.split(/\s+/)[0] || `Sequence ${index + 1}`;
  const who = header ? `Record ${index + 1} (${shorten(name)})` : count > 1 ? `Sequence ${index + 1}` : "The sequence";
  const residues = []; // and where each stands in the text
  const places = [];
  for (const { line, start: offset } of parts) {
    let at = offset;
    for (const character of line) {
      if (character.trim()) residues.push(character), places.push(at);
      at += character.length;
    }
  }
  if (residues.at(-1) === "*") residues.pop();
  const wrong = residues.findIndex((character) => !ALLOWED.has(upper(character)));
  if (wrong >= 0) {
    const character = residues[wrong];
    const meant = hint(character, residues.slice(wrong, wrong + 6).join(""));
    problems.push({
      message: `${who}: “${visible(character)}” at position ${wrong + 1} is not allowed${meant}; ${EXPECTED}.`,
      start: places[wrong],
      end: places[wrong] + character.length,
    });
  } else if (!residues.length) {
    problems.push({ message: `${who} has no sequence.`, start, end });
  } else if (residues.length > maxLength) {
    problems.push({
      message: `${who} has ${residues.length} residues; at most ${maxLength} are allowed. Cut it, or compute domains apart.`,
      start: places[maxLength],
      end: places[residues.length - 1] + 1,
    });
  }
  return { name, header, sequence: residues.map(upper).join("") };
}

// ASCII only: toUpperCase would make SS of the letter ß.
function upper(character) {
  return /[a-z]/.test(character) ? character.toUpperCase() : character;
}

function visible(character) {
  return /\p{C}/u.test(character) ? `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}` : character;
}

function hint(character, rest) {
  if (/^<mask/i.test(rest)) return " (masks belong to the API’s predict)";
  if (character === "*") return " (a stop inside the sequence)";
  if (/\d/.test(character)) return " (a number; remove position numbers)";
  if (character === "J") return " (leucine or isoleucine: write L, I or X)";
  if (character === ".") return " (gaps are written -)";
  if (character === ">") return " (a header starts a line of its own)";
  return "";
}

function shorten(name) {
  return name.length > 40 ? `${name.slice(0, 39)}…` : name;
}
