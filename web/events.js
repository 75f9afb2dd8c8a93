// Recorded events come from other people's browsers and may be anything. Here
// they become what rrweb's Replayer can play: well-formed, in order, disarmed.

import { FULL, INCREMENTAL, isObject, list, META, MUTATION, POINTER, Story } from './story.js';

const RESIZE = 4, POSITIONS = [1, 6, 12]; // mouse, touch, drag

// Origins whose pictures, fonts and style sheets may be loaded: the page's policy
// names them too.
export const mediaOrigins = document.querySelector('meta[name="media-origins"]').content.split(' ').filter(Boolean);
export const isOpen = (url) => typeof url === 'string' && URL.canParse(url) && mediaOrigins.includes(new URL(url).origin);

const finite = (...numbers) => numbers.every(Number.isFinite);

// A time that is no number, or an empty list of positions, becomes a NaN in the
// Replayer's queue, which then waits for it for ever. A pointer's event whose type is
// no number would be dispatched in the page.
export function wellFormed(e) {
  if (!isObject(e) || !Number.isInteger(e.type) || !isObject(e.data)) return false;
  if (!finite(e.timestamp) || Math.abs(e.timestamp) > 8.64e15) return false;
  if (e.type === META) return finite(e.data.width, e.data.height);
  if (e.type === FULL) return isObject(e.data.node) && Array.isArray(e.data.node.childNodes);
  if (e.type !== INCREMENTAL) return true;
  if (e.data.source === POINTER) return Number.isInteger(e.data.type);
  if (!POSITIONS.includes(e.data.source)) return true;
  const { positions } = e.data;
  return Array.isArray(positions) && positions.length > 0
    && positions.every((p) => isObject(p) && finite(p.x, p.y, p.timeOffset));
}

// forget also takes out what is no attribute's value; only a style's change may be an object.
function forget(attributes, names) {
  for (const [name, value] of Object.entries(attributes)) {
    if (names.includes(name.toLowerCase()) || isObject(value) && name !== 'style') delete attributes[name];
  }
}

// The page's Content-Security-Policy stops scripts and requests of recorded
// nodes. Chromium still connects, or looks a name up, for <link rel=preconnect>
// and its kin, for what stands in srcdoc, and for the address of a frame before
// it refuses it: those attributes go. Nothing seen depends on them, because
// rrweb records style sheets and frames by content.
const ARMED = ['http-equiv', 'srcdoc', 'autofocus', 'referrerpolicy'];
const FRAMES = ['iframe', 'frame', 'object', 'embed'];

// rrweb makes url(#id), which points into the page, an address in the folder of
// its style sheet.
function pointInside(attributes) {
  for (const name of ['_cssText', 'style']) {
    const text = attributes[name];
    if (typeof text === 'string') attributes[name] = text.replace(/url\((["']?)[^"'()\s]*\/#/g, 'url($1#');
  }
}

function disarmAttributes(tag, attributes) {
  forget(attributes, ARMED);
  pointInside(attributes);
  // rrweb would draw it, but a page without scripts shows no canvas.
  if (tag === 'canvas' && typeof attributes.rr_dataURL === 'string') attributes['replay-image'] = attributes.rr_dataURL;
  if (FRAMES.includes(tag)) forget(attributes, ['src', 'data']);
  if (tag === 'meta' && attributes.name !== 'color-scheme') forget(attributes, ['name']); // of referrer, say
  if (tag !== 'link') return;
  const { rel, href } = attributes;
  forget(attributes, ['rel', 'href']); // in capitals, too
  if (rel === 'stylesheet' && isOpen(href)) Object.assign(attributes, { rel, href });
}

// disarmNodes walks a tree, adding the ids of its frames and metas. A loop, not recursion:
// how deep the tree is, is for the recorded page to say.
function disarmNodes(root, armed) {
  for (const open = list([root]); open.length > 0;) {
    const node = open.pop();
    if (typeof (node.tagName ?? '') !== 'string') node.tagName = 'i'; // ['iframe'] would do as a name
    const tag = node.tagName?.toLowerCase();
    if (FRAMES.includes(tag) || tag === 'meta') armed.add(node.id);
    if (isObject(node.attributes)) disarmAttributes(tag, node.attributes);
    for (const child of list(node.childNodes)) open.push(child);
  }
}

function disarm(e, armed) {
  if (e.type === FULL) {
    const { left, top } = e.data.initialOffset ?? {};
    e.data.initialOffset = finite(left, top) ? { left, top } : { left: 0, top: 0 };
    disarmNodes(e.data.node, armed);
  }
  if (e.type !== INCREMENTAL || e.data.source !== MUTATION) return;
  for (const { node } of list(e.data.adds)) disarmNodes(node, armed);
  for (const change of list(e.data.attributes)) {
    if (!isObject(change.attributes)) continue;
    forget(change.attributes, ['rel', ...ARMED]); // a link without rel does nothing
    pointInside(change.attributes);
    if (armed.has(change.id)) forget(change.attributes, ['src', 'data', 'name']);
  }
}

// A Cleaner takes a session's events in the order of their index, piece by piece.
export class Cleaner {
  constructor(viewport, onMoment) {
    const { width, height } = viewport ?? {};
    this.size = finite(width, height) ? { width, height } : { width: 1280, height: 720 };
    this.last = null; // time of the newest event
    this.armed = new Set(); // ids of nodes that load documents, or could say what is sent with requests
    this.story = new Story(onMoment);
  }

  // take returns what the Replayer gets. To seek, it goes to the last Meta, and expects a
  // full snapshot right behind it: so every snapshot gets one at its own time, and
  // a page's own Meta is a resize, if it is one.
  take(raw) {
    const events = [];
    for (const e of raw) {
      if (!wellFormed(e)) continue;
      // Order is the index's, never the clock's; the Replayer sorts by time.
      const timestamp = this.last = Math.max(e.timestamp, this.last ?? e.timestamp);
      e.timestamp = timestamp;
      try { this.story.take(e); } catch { /* words that no page has */ }
      disarm(e, this.armed);
      if (e.type === META && this.resize(e.data)) {
        events.push({ type: INCREMENTAL, data: { source: RESIZE, ...this.size }, timestamp });
      }
      if (e.type === FULL) events.push({ type: META, data: { href: '', ...this.size }, timestamp });
      if (e.type === FULL || e.type === INCREMENTAL) events.push(e);
    }
    return events;
  }

  resize({ width, height }) {
    const before = this.size;
    this.size = { width, height };
    return width !== before.width || height !== before.height;
  }
}
