// The part of the tracker that says what may leave the page. tracker.js calls
// clean() with each event that rrweb has finished.
//
// rrweb masks what inputs show. The rest is closed here, on the finished event:
// value attributes (behind an emptied field, of hidden, radio and custom
// elements), editable text, shadow roots, data- attributes that repeat a value,
// srcdoc, handlers, tokens in meta elements, query strings.

let maskSelector, blockSelector;
const IGNORED = "[data-replay-ignore], [data-replay-ignore] *";
const CONTROLS = /^(input|textarea|select)$/;
const OWN_VALUE = /^(button|option|li|progress|meter|data|param)$/; // their value attribute is the page's
const URLS = /^(href|src|srcset|rr_src|action|formaction|xlink:href|data|poster)$/;
const WORDS = /^(title|alt|placeholder|label|summary|aria-(label|description|placeholder|roledescription)|data-.*)$/;
const ECHO = /^data-(?!replay-|rr-)/; // on a control: where scripts copy its value

const stars = (text) => text.replace(/\S/g, "*");
const isButton = (el) => el.localName === "input" && /^(button|submit|reset|image)$/.test(el.type);

function maskValue(value, el) {
  if (isButton(el)) return value; // it is the label
  if (el.type === "hidden" || el.matches(IGNORED)) return "";
  if (el.type === "password") return value && "********"; // not even its length
  return "*".repeat(value.length);
}

// cutQuery cuts a URL's query, and a fragment that carries values. Of pictures
// too: they may be signed, and the viewer loads none from other hosts.
function cutQuery(url) {
  if (options.allowQuery || /^(data|blob):/i.test(url)) return url;
  const [, path, fragment] = /^([^?#]*)[^#]*#?([^?]*)/.exec(url);
  return path + (fragment && !fragment.includes("=") ? "#" + fragment : "");
}

// cutQueries does so for absolute URLs and url(…) in any JSON, style sheet or
// stack (line and column stay). The bound: a long text without blanks would
// cost its length squared.
const QUERIES = /((?:https?:\/\/|url\((?!\\?["']?data:)\\?["']?)[^\s"\\?#<>]{1,1024})\?[^\s"'\\<>()#]*?((?::\d+){0,2})(?=[\s"'\\<>()#]|$)/gi;
const cutQueries = (text) => (options.allowQuery || !text.includes("?") ? text : text.replace(QUERIES, "$1$2"));

// outer is the element around a node, also out of a shadow tree or a frame.
function outer(node) {
  const parent = node.nodeType === 9 ? node : node.parentNode;
  if (!parent || parent.nodeType === 1) return parent;
  return parent.host || (parent.defaultView && parent.defaultView.frameElement) || null;
}

// view tells how an element is recorded: 0 openly, 1 masked, 2 not at all.
// seen remembers the answers for the length of one event.
function view(el, seen) {
  if (!el) return 0;
  let v = seen.get(el);
  if (v === undefined) {
    v = el.matches(blockSelector) ? 2 : el.matches(maskSelector) || el.ownerDocument.designMode === "on" ? 1 : 0;
    if (v < 2) v = Math.max(v, view(outer(el), seen));
    seen.set(el, v);
  }
  return v;
}

const nodeOf = (id) => record.mirror.getNode(id);

function cleanAttributes(el, attributes, masked) {
  const tag = el.localName;
  const control = CONTROLS.test(tag);
  for (const name of Object.keys(attributes)) {
    const value = attributes[name];
    if (/^on|^srcdoc$|^selected$/.test(name)) delete attributes[name]; // a frame's document is recorded itself
    else if (typeof value !== "string" || name.startsWith("rr_") && name !== "rr_src") continue;
    else if (name === "value") { if (!OWN_VALUE.test(tag)) attributes.value = maskValue(value, el); }
    else if (/^aria-value/.test(name) || masked && WORDS.test(name) || control && ECHO.test(name)) attributes[name] = stars(value);
    else if (tag === "meta" && name === "content" && !/^(viewport|color-scheme)$/.test(el.name)) attributes[name] = "";
    else if (masked && (/^(a|area)$/.test(tag) && name === "href" || /^data:/.test(value))) attributes[name] = ""; // a typed link, a pasted picture
    else if (URLS.test(name) || /^[^\s?]+\?\S*=/.test(value) && name !== "style" && name !== "_cssText") attributes[name] = cutQuery(value);
  }
}

// cleanNode cleans a serialized node and all below it.
function cleanNode(serialized, seen) {
  const node = nodeOf(serialized.id);
  if (serialized.attributes) cleanAttributes(node, serialized.attributes, view(node, seen) > 0);
  else if (serialized.textContent) serialized.textContent = cleanText(node, serialized.textContent, seen);
  for (const child of serialized.childNodes || []) cleanNode(child, seen);
}

function cleanText(node, text, seen) {
  const el = outer(node);
  if (el && el.localName === "style") return text;
  if (el && el.localName === "noscript") return ""; // markup as text; a replay never shows it
  return view(el, seen) > 0 ? stars(text) : text;
}

// cleanMutation also leaves out what happens in a blocked element: rrweb's own
// check stops at a shadow root, and does not see what was blocked later. (Text
// in there is masked like any other that is not recorded openly.)
function cleanMutation(data, seen) {
  data.adds = data.adds.filter((add) => view(outer(nodeOf(add.node.id)) || nodeOf(add.parentId), seen) < 2);
  data.attributes = data.attributes.filter((a) => view(outer(nodeOf(a.id)), seen) < 2);
  for (const add of data.adds) cleanNode(add.node, seen);
  for (const text of data.texts) if (text.value) text.value = cleanText(nodeOf(text.id), text.value, seen);
  for (const a of data.attributes) cleanAttributes(nodeOf(a.id), a.attributes, view(nodeOf(a.id), seen) > 0);
}

function clean(event) {
  const { type, data } = event;
  if (type === META) data.href = cutQuery(data.href);
  if (type === FULL) cleanNode(data.node, new Map());
  if (type !== INCREMENTAL) return;
  if (data.source === MUTATION) cleanMutation(data, new Map());
  if (data.source === INPUT) data.text = maskValue(data.text, nodeOf(data.id));
}
