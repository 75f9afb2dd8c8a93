// The part of the tracker that says what may leave the page. tracker-record.js calls
// clean() with each event that rrweb has finished; what the tracker says itself goes
// through hide(), cleanWords() and cutAddress().
//
// rrweb masks what inputs show. The rest is closed here, on the finished event:
// value attributes (behind an emptied field, of hidden, radio and custom
// elements), editable text, shadow roots, data- attributes that repeat a value,
// srcdoc, handlers, tokens in meta elements, what addresses carry; and, wherever
// it comes up again, what was typed.

// Browsers before Chrome 90, Firefox 86 and Safari 15 would never let go of a
// listener: nothing happens in them. They have to read this script for that, so
// the tracker keeps to the syntax of 2019; otherwise it would be an error in each page.
let endsListeners = false;
EventTarget.prototype.addEventListener.call(window, "", null, { get signal() { endsListeners = true; } });
if (!endsListeners) return;

let maskSelector, blockSelector, anySelector; // the owner's two; all elements that may be secret in themselves
const IGNORED = "[data-replay-ignore], [data-replay-ignore] *";
const SHOWN = "[data-replay-show]:not([data-rr-is-password])"; // rrweb marks what was a password's field
const EDITOR_CLASS = /CodeMirror|cm-editor|monaco-editor|ace_editor|xterm|ql-editor|ProseMirror/i;
const EDITORS = "textarea, [contenteditable]:not([contenteditable=false i]), [role~=textbox i], [role~=searchbox i], "
  + "[role~=combobox i], ." + EDITOR_CLASS.source.replace(/\|/g, ", .");
// Tags and attributes of what may be secret in itself, the owner's own selectors apart.
const TELLING = /^(html|svg|form|textarea|role|contenteditable|data-replay-(mask|block))$/;
const CONTROLS = /^(input|textarea|select)$/;
const CHOICES = /^(radio|checkbox)$/;
const BUTTONS = /^(button|submit|reset|image)$/;
const SET = /^(radio|checkbox|range|color|button|submit|reset|image|select-.*)$/; // nobody types into these
const OWN_VALUE = /^(button|option|li|progress|meter|data|param)$/; // their value attribute is the page's
const URLS = /^(href|src|rr_src|action|formaction|xlink:href|data|poster|cite|background|longdesc|manifest)$/;
const WORDS = /^(title|alt|placeholder|label|summary|value|content|datetime|download|aria-(label|.*description|placeholder)|data-.*)$/;
const ECHO = /^data-(?!replay-|rr-)/; // on a control: where scripts copy its value

// A form with a field named tagName has no tagName of its own to read, and a
// document with an image named hidden no hidden: what is read of a page's forms
// and documents is read through the prototypes' own getters.
const own = (f) => Function.prototype.call.bind(f);
const getter = (type, name) => own(Object.getOwnPropertyDescriptor(type.prototype, name).get);
const nodeType = getter(Node, "nodeType"), parentNode = getter(Node, "parentNode");
const localName = getter(Element, "localName"), childElementCount = getter(Element, "childElementCount");
const attributesOf = getter(Element, "attributes"), ownerDocument = getter(Node, "ownerDocument");
const viewOf = getter(Document, "defaultView"), designMode = getter(Document, "designMode");
const isHidden = getter(Document, "hidden"), referrerOf = getter(Document, "referrer");
const titleOf = getter(Document, "title"), addressOf = getter(Document, "documentURI");
const focusOf = getter(Document, "activeElement"), byTag = own(Document.prototype.getElementsByTagName);
const matches = own(Element.prototype.matches), attributeOf = own(Element.prototype.getAttribute);
const attributeNames = own(Element.prototype.getAttributeNames), boxOf = own(Element.prototype.getBoundingClientRect);
const byId = own(Document.prototype.getElementById), byName = own(Document.prototype.getElementsByName);

const stars = (text) => text.replace(/\S/g, "*");
const nodeOf = (id) => record.mirror.getNode(id);
const isControl = (el) => CONTROLS.test(localName(el));

// ── What was typed ───────────────────────────────────────────────────────────
// The page remembers it, in memory and for as long as it lives: the values of
// masked controls and runs of keys, from SHORTEST characters up. hide() masks
// these strings, in any case of letters, wherever they come up again.

const SHORTEST = 4, LONGEST = 20000, MOST = 2000;
const DRAWN_MS = 2000; // after a key: what appears and is part of what was typed was drawn by an editor
const typed = new Set(); // folded, the oldest first
const typedInto = new WeakSet(); // elements that are or were edited, texts that were drawn: masked whole
const live = new WeakMap(); // a control, or the text at the caret, → what it held last
const tree = new Map(); // of typed, a character a level; end is how many strings end there
const seeds = new Uint8Array(1 << 16); // hashes of the first SHORTEST characters: without a seed no string begins
let haystack = null; // all of typed, a line each; null: to be made anew
let run = "", runIn = null, runAt = -Infinity; // the keys since finish(), their target, the time of the last one

// fold gives a text in lower case, with every blank a space, as long as it was.
// İ is the only letter whose lower case is longer.
const fold = (text) => text.replace(/\u0130/g, "i").toLowerCase().replace(/[^\S ]/g, " ");

// roll goes on with the hash of the last SHORTEST characters.
const roll = (hash, code) => ((hash << 4) ^ code) & 0xffff;

// plant puts a string into the tree, in pieces if it is long, also as a query has it;
// by: -1 takes it out.
function plant(text, by) {
  for (const form of [text, text.replace(/ /g, "+")]) {
    for (const piece of form.match(/.{4,64}(?!.{1,3}$)/gs) || []) {
      put(tree, piece, 0, by);
      let hash = 0;
      for (let i = 0; i < SHORTEST; i++) hash = roll(hash, piece.charCodeAt(i));
      seeds[hash] = 1;
    }
  }
}

function put(node, piece, i, by) {
  if (i === piece.length) return void (node.end = (node.end || 0) + by);
  const next = node.get(piece[i]) || new Map();
  node.set(piece[i], next);
  put(next, piece, i + 1, by);
  if (!next.end && !next.size) node.delete(piece[i]);
}

function unlearn(text) {
  if (typed.delete(text)) plant(text, -1);
}

// learn remembers a text; before is what it has grown from.
function learn(text, before = "") {
  text = fold(text.slice(0, LONGEST)).trim();
  if (text.length < SHORTEST || typed.has(text) || /^[*•\s]*$/.test(text)) return;
  if (text.startsWith(fold(before).trim())) unlearn(fold(before).trim());
  if (typed.size >= MOST) unlearn(typed.values().next().value);
  typed.add(text);
  plant(text, 1);
  haystack = null;
}

// linesOf gives what is learned of a text: of a long one its lines and sentences, so
// that a key costs no more than the line it is in.
const linesOf = (text) => (text.length < 400 ? [text] : text.slice(0, LONGEST).split(/\n|[.!?]\s/));

// Names, numbers and codes are remembered one by one too; of plain words only
// the whole text, or every page would be full of stars.
function learnWords(text) {
  for (const line of linesOf(text)) learn(line);
  for (const [word] of text.slice(0, LONGEST).matchAll(/\S{4,}/g)) {
    if (!/^[a-z]+[.,;:!?]*$/.test(word)) learn(word.replace(/[.,;:!?]+$/, ""));
  }
}

// typedAt gives how many characters from i on were typed: a whole string, or the
// beginning of one where the word ends, as while it is typed.
function typedAt(low, i) {
  let node = tree, n = 0, whole = 0;
  while ((node = node.get(low[i + n]))) if (n++, node.end) whole = n;
  return n < SHORTEST || /[\p{L}\p{N}]/u.test(low[i + n] || "") ? whole : n;
}

function decode(encoded) {
  try {
    return decodeURIComponent(encoded);
  } catch { // part of a character
    return "?";
  }
}

// hide masks in a text what was typed. Where that is encoded, as in addresses, all of
// the text is shown decoded.
function hide(text) {
  if (!typed.size || text.length < SHORTEST) return text;
  const plain = text.includes("%") ? text.replace(/(%[\da-f]{2})+/gi, decode) : text, masked = mask(plain);
  return masked === plain && plain !== text ? mask(text) : masked;
}

function mask(text) {
  const low = fold(text);
  let out = "", from = 0;
  for (let i = 0, hash = 0; i < low.length; i++) {
    hash = roll(hash, low.charCodeAt(i));
    const start = i - SHORTEST + 1, length = seeds[hash] && start >= from && typedAt(low, start);
    if (!length) continue;
    out += text.slice(from, start) + stars(text.slice(start, start + length));
    from = start + length;
  }
  return from ? out + text.slice(from) : text;
}

// Classes, ids and the like stay as they are if the page had them before
// somebody typed the same: a page without its styles is no picture.
const names = new Set();
function hideInName(value) {
  if (names.has(value)) return value;
  if (hide(value) !== value) return value.split(/\s+/).map((word) => (names.has(word) ? word : hide(word))).join(" ");
  if (names.size > 50000 || value.length > 500) return value;
  names.add(value);
  for (const word of value.split(/\s+/)) names.add(word);
  return value;
}

// isDrawn tells whether a text that appears just after a key is a piece of what
// was typed: editors draw it in lines and tokens, letter by letter.
function isDrawn(text) {
  const piece = fold(text).trim();
  if (!piece) return false;
  haystack = haystack || [...typed].join("\n");
  return fold(run).includes(piece) || piece.length >= SHORTEST && haystack.includes(piece);
}

const targetOf = (event) => event.composedPath()[0] || event.target;
const isElement = (node) => !!node && nodeType(node) === 1;
const shows = (el) => isElement(el) && matches(el, SHOWN) && !/^(password|hidden)$/.test(el.type)
  && !secrecy(el);

// hear learns what a control, or a text node, holds now.
function hear(holder, text) {
  const before = live.get(holder) || "";
  if (before.startsWith(text)) return; // something was deleted: its beginning is known
  live.set(holder, text);
  const known = linesOf(before), lines = linesOf(text), was = new Set(known), is = new Set(lines);
  const gone = known.find((line) => !is.has(line));
  for (const line of lines) if (!was.has(line)) learn(line, gone);
}

function finish() {
  learnWords(run);
  run = "";
  if (isElement(runIn) && isControl(runIn) && !SET.test(runIn.type) && !shows(runIn)) learnWords(runIn.value);
}

const GOES_ON = /^(Backspace|Shift|CapsLock|AltGraph|Process|Unidentified|Dead)$/;
function heardKey(event) {
  const target = targetOf(event), { key = "", isTrusted } = event;
  if (!isTrusted) return;
  if (target !== runIn || key.length > 1 && !GOES_ON.test(key)) finish();
  runIn = target;
  if (key === "Backspace") run = run.slice(0, -1);
  if (key.length !== 1 || event.ctrlKey > event.altKey || event.metaKey || shows(target)) return;
  learn(run + key, run);
  run += key;
  runAt = now();
}

function heardInput(event) {
  const el = targetOf(event);
  if (!isElement(el) || shows(el)) return;
  runAt = now();
  if (!isControl(el)) { // an editor: what is at the caret
    const selection = ownerDocument(el).getSelection(), text = selection && selection.anchorNode;
    if (text && nodeType(text) === 3 && text.data.length < 1000) hear(text, text.data);
  } else if (el.type === "file") for (const file of el.files) learn(file.name);
  else if (!SET.test(el.type)) hear(el, el.value);
}

function heardText(event) {
  const data = event.clipboardData || event.dataTransfer;
  if (!event.isTrusted || shows(targetOf(event))) return;
  runAt = now();
  if (!data) run += event.data || ""; // composed of several keys
  else for (const line of data.getData("text").split("\n", 100)) learnWords(line);
}

const HEARD = { keydown: heardKey, input: heardInput, change: finish, focusout: finish, pointerdown: finish,
  paste: heardText, drop: heardText, compositionend: heardText };
for (const type of Object.keys(HEARD)) HEARD[type] = safe(HEARD[type]);

// hearTyping listens in a window, of the page or of a frame, ahead of the page.
function hearTyping(win) {
  for (const type of Object.keys(HEARD)) on(win, type, HEARD[type], true);
}

// ── Controls ─────────────────────────────────────────────────────────────────

function maskValue(value, el) {
  if (BUTTONS.test(el.type)) return secrecy(el) ? stars(value) : cleanWords(value); // its label
  if (shows(el)) return value;
  if (el.type === "hidden" || matches(el, IGNORED)) return "";
  if (el.type === "password" || localName(el) === "select") return value && "********"; // not even its length
  return "*".repeat(value.length);
}

// maskInput is what rrweb calls with the value of a control, typed or set by a
// script. What the page's markup says is not what somebody typed.
function maskInput(value, el) {
  const set = el.type === "hidden" ? live.has(el) && !/^[a-z]*$/.test(value) : value !== el.defaultValue;
  if (value && !SET.test(el.type) && !shows(el)) {
    if (set) hear(el, value);
    else live.set(el, value);
  }
  return maskValue(value, el);
}

// ── Addresses ────────────────────────────────────────────────────────────────

// A route's names and numbers, up to the first part that may be a token.
const ROUTE = /^!?(?:\/(?:(?:\p{L}{1,24}|\d{1,10})(?:[-_.~](?:\p{L}{1,24}|\d{1,10}))*)?(?=\/|$))+/u;

function cutFragment(fragment, doc) {
  if (/^!?\//.test(fragment)) return "#" + (ROUTE.exec(fragment.split(/[?;&=]/)[0]) || [""])[0];
  return doc && (byId(doc, fragment) || byName(doc, fragment).length || fragment === "top") ? "#" + fragment : "";
}

// cutAddress cuts from an address what may be secret: user and password, path
// parameters, the query, a fragment that is neither a route nor, in doc, the
// name of a section. Of pictures too: they may be signed.
function cutAddress(address, doc = null) {
  const inline = /^(?:blob:|data:([^,]*;base64,)?)/i.exec(address);
  if (inline) return inline[1] ? address : hide(address);
  const [, path, query = "", fragment = ""] = /^([^?#]*)(\?[^#]*)?(?:#(.*))?$/s.exec(address);
  const open = path.replace(/^([a-z][a-z\d+.-]*:)?\/\/[^/]*@/i, "$1//").replace(/;[^/]*/g, "");
  if (options.allowQuery) return hide(open + query + (fragment && "#" + fragment));
  return hide(open + (fragment && cutFragment(fragment, doc)));
}

// cutPlain leaves the fragment: in drawings it names what is drawn.
const cutPlain = (address) => address.replace(/^[^#]*/, (plain) => cutAddress(plain));

// cutAddresses cuts the absolute addresses in any text, and in the stack of an
// error (line and column stay).
const ABSOLUTE = /\b(?:https?|wss?|ftp|file):\/\/(?:[^\s"'<>\\]|'(?=\w))+/gi;
const SESSION = /;\w{0,20}sess\w{0,20}=[^\s"'<>?#&;/]+/gi;
function cutAddresses(text) {
  if (text.includes(";")) text = text.replace(SESSION, "");
  if (!text.includes("://")) return text;
  return text.replace(ABSOLUTE, (found) => {
    const rest = /(?::\d+){0,2}[).,;]{0,9}$/.exec(found)[0];
    return cutAddress(found.slice(0, found.length - rest.length)) + rest;
  });
}

const cleanWords = (text) => hide(cutAddresses(text));

// In style sheets addresses stand in url(…), and words in quotes and variables.
const CSS_URL = /(url\(\s*\\?|@import\s+(?=["']))("[^"\\]*|'[^'\\]*|[^"')\\]+)/gi;
const CSS_TEXT = /"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|--[\w-]+\s*:[^;}]*/gs;
function cleanCSS(css) {
  if (/url\(|@import/i.test(css)) css = css.replace(CSS_URL, (_, before, address) => before + address.replace(/[^"'].*/s, cutPlain));
  return hide(css) === css ? css : css.replace(CSS_TEXT, hide);
}

// ── Elements ─────────────────────────────────────────────────────────────────

// outer is the element around a node, also out of a shadow tree or a frame.
function outer(node) {
  const parent = parentNode(node) || node, type = nodeType(parent);
  if (type === 1) return parent === node ? null : parent;
  const win = type === 9 && viewOf(parent);
  return win ? win.frameElement : type === 11 && parent.host || null;
}

// secrecy tells how an element is recorded; of an editor the text is masked, its own
// labels are not. seen remembers the answers for the length of one event.
const OPEN = 0, EDITOR = 1, MASKED = 2, BLOCKED = 3;

// secrecyItself leaves out what is around the element. What was an editor stays one.
function secrecyItself(el, isTold = true) {
  if (isTold && matches(el, anySelector)) {
    if (matches(el, blockSelector)) return BLOCKED;
    if (matches(el, maskSelector)) return MASKED;
    if (!matches(el, SHOWN) && (matches(el, EDITORS) || designMode(ownerDocument(el)) === "on")) typedInto.add(el);
  }
  return typedInto.has(el) ? EDITOR : OPEN;
}

const within = (around, found) => (around ? Math.max(found, around, MASKED) : found);

function secrecy(el, seen = new Map()) {
  if (!el) return OPEN;
  let found = seen.get(el);
  if (found === undefined) {
    found = secrecyItself(el);
    if (found < BLOCKED) found = within(secrecy(outer(el), seen), found);
    seen.set(el, found);
  }
  return found;
}

// secrecyAt is the secrecy of an element, or of the element around any other node, by
// id. For what the event adds it is in seen already.
function secrecyAt(id, seen) {
  if (!seen.has(id)) {
    const node = nodeOf(id);
    seen.set(id, node ? secrecy(isElement(node) ? node : outer(node), seen) : OPEN);
  }
  return seen.get(id);
}

// isTelling spares asking the browser about most elements.
function isTelling(tag, attributes) {
  if (options.maskText || options.blockSelector || TELLING.test(tag) || EDITOR_CLASS.test(attributes.class)) return true;
  for (const name in attributes) if (TELLING.test(name)) return true;
  return false;
}

// A link's fragment may name a section of its own page.
function cleanAddress(el, tag, value) {
  if (tag === "img" || el.ownerSVGElement && tag !== "a") return cutPlain(value);
  const doc = ownerDocument(el), [path] = value.split(/[?#]/);
  return cutAddress(value, !path || path === addressOf(doc).split(/[?#]/)[0] ? doc : null);
}

const cleanDeclaration = (name, value) => (name.startsWith("--") ? cleanWords(value) : cleanCSS(value));
function cleanStyle(style) {
  for (const [name, value] of Object.entries(style)) {
    if (typeof value === "string") style[name] = cleanDeclaration(name, value);
    else if (value) value[0] = cleanDeclaration(name, value[0]); // and its priority
  }
}

function cleanAttribute(el, tag, name, value, masked) {
  if (name === "value" && !OWN_VALUE.test(tag)) return CONTROLS.test(tag) ? maskValue(value, el) : stars(value);
  if (/^aria-value/.test(name) || masked && WORDS.test(name)) return stars(value);
  if (CONTROLS.test(tag) && ECHO.test(name) && !shows(el)) return stars(value);
  if (tag === "meta" && name === "content" && !/^(viewport|color-scheme)$/.test(el.name)) return "";
  // A link that was typed, a picture that was pasted.
  if (masked && (/^(a|area)$/.test(tag) && name === "href" || /^data:/.test(value))) return "";
  if (/^(style|_cssText|replay-.*)$/.test(name)) return cleanCSS(value);
  if (/srcset$|^ping$/.test(name)) return value.replace(/\S+/g, (part) => cutAddress(part));
  if (URLS.test(name)) return cleanAddress(el, tag, value);
  if (/^[^\s?]+\?\S*=/.test(value)) return cutAddress(value);
  return WORDS.test(name) ? cleanWords(value) : hideInName(cutAddresses(value));
}

// A control, or an editor, is labelled by its page: its own words are masked
// only where the owner says so, or what is around it is masked.
function cleanAttributes(el, tag, attributes, masked) {
  for (const name of Object.keys(attributes)) {
    const value = attributes[name];
    if (/^on|^srcdoc$|^selected$/.test(name)) delete attributes[name]; // a frame's document is recorded itself
    else if (name === "style" && value && typeof value === "object") cleanStyle(value);
    else if (typeof value === "object" && value) delete attributes[name]; // a form's field of the name that rrweb reads
    else if (typeof value === "string" && (!name.startsWith("rr_") || name === "rr_src")) {
      attributes[name] = cleanAttribute(el, tag, name, value, masked);
    }
  }
}

// cleanBlocked leaves the room that a blocked element takes.
function cleanBlocked(serialized, el) {
  const { width, height } = boxOf(el), name = attributeOf(el, "class");
  serialized.attributes = { ...name && { class: hideInName(name) }, rr_width: `${width}px`, rr_height: `${height}px` };
  serialized.childNodes = [];
  delete serialized.isShadowHost;
}

// cleanNode cleans a serialized node and all below it, when the picture has what it
// needs of them. around is the secrecy around it; fresh: it appears just after a key.
// A change may have a hundred thousand nodes.
function cleanNode(serialized, around, seen, fresh) {
  const { id, attributes, textContent } = serialized, node = nodeOf(id);
  if (node) picture.meet(serialized, node);
  if (attributes) seen.set(id, around = cleanElement(serialized, node, around));
  else if (textContent) serialized.textContent = cleanText(node, textContent, around, fresh);
  for (const child of serialized.childNodes || []) cleanNode(child, around, seen, fresh);
}

function cleanElement(serialized, el, around) {
  const tag = localName(el);
  const secret = within(around, secrecyItself(el, isTelling(tag, serialized.attributes)));
  if (secret === BLOCKED) cleanBlocked(serialized, el);
  else {
    if (tag === "form") cleanForm(serialized, el);
    cleanAttributes(el, tag, serialized.attributes, secret === MASKED);
    if (CONTROLS.test(tag)) noteControl(serialized.id, el);
  }
  return secret;
}

// What rrweb took for a form's attributes may be a field of that name.
function cleanForm(serialized, form) {
  delete serialized.isSVG;
  if (attributesOf(form) === form.attributes) return;
  const real = attributeNames(form).map((name) => [name, attributeOf(form, name)]);
  const noted = Object.entries(serialized.attributes).filter(([name]) => name.startsWith("rr_"));
  serialized.attributes = Object.fromEntries(real.concat(noted));
}

function cleanText(node, text, secret, fresh) {
  const el = outer(node), tag = el && localName(el);
  if (tag === "style") return cleanCSS(text);
  if (tag === "noscript") return ""; // markup as text; a replay never shows it
  if (secret || typedInto.has(node)) return stars(text);
  if (!fresh || !el || !isDrawn(text)) return cleanWords(text);
  typedInto.add(tag !== "body" && childElementCount(el) < 4 ? el : node);
  return stars(text);
}

// ── Events ───────────────────────────────────────────────────────────────────

// cleanMutation also leaves out what happens in a blocked element.
function cleanMutation(data, seen, fresh) {
  const isSeen = (id) => secrecyAt(id, seen) < BLOCKED, isThere = ({ id }) => nodeOf(id) && isSeen(id);
  data.removes = data.removes.filter(({ parentId }) => isSeen(parentId));
  data.attributes = data.attributes.filter(isThere);
  data.texts = data.texts.filter(isThere);
  data.adds = data.adds.filter(({ parentId, node }) => {
    if (data.isAttachIframe) hearFrame(nodeOf(node.id));
    const around = secrecyAt(nodeOf(parentId) ? parentId : node.id, seen);
    if (around === BLOCKED) return false;
    cleanNode(node, around, seen, fresh);
    return true;
  });
  for (const text of data.texts) {
    if (text.value) text.value = cleanText(nodeOf(text.id), text.value, secrecyAt(text.id, seen), fresh);
  }
  for (const { id, attributes } of data.attributes) {
    cleanAttributes(nodeOf(id), localName(nodeOf(id)), attributes, secrecyAt(id, seen) === MASKED);
  }
  return data.adds.length + data.removes.length + data.attributes.length + data.texts.length > 0;
}

function cleanSheets(data) {
  for (const rule of [...data.adds || [], ...(data.styles || []).flatMap(({ rules }) => rules)]) {
    if (rule.rule) rule.rule = cleanCSS(rule.rule);
  }
  for (const name of ["replace", "replaceSync", "fontSource"]) if (data[name]) data[name] = cleanCSS(data[name]);
  const { set } = data;
  if (set && set.value) set.value = cleanDeclaration(set.property, `${set.value}`);
  return true;
}

// clean says false if nothing of the event is left.
function clean(event) {
  const { type, data } = event, seen = new Map();
  if (type === META) data.href = cutAddress(data.href, document);
  if (type === FULL) cleanNode(data.node, OPEN, seen, false);
  if (type !== INCREMENTAL) return true;
  if (data.source === MUTATION) return cleanMutation(data, seen, event.timestamp - runAt < DRAWN_MS);
  if (data.id && secrecyAt(data.id, seen) === BLOCKED) return false;
  if (data.source === INPUT) {
    const el = nodeOf(data.id);
    if (!el) return false; // a mutation that is still to come brings it
    if (CHOICES.test(el.type)) data.text = maskValue(data.text, el); // rrweb leaves these as they are
    noteControl(data.id, el);
  }
  return cleanSheets(data);
}
