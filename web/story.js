// What happened in a session, in words: pages, clicks, inputs, events, gaps.
//
// A Story reads well-formed events in their order, from a full snapshot on, and
// tells moments: {key, kind, time, text, …}. A moment that is told again under
// its key replaces what was known of it. To name what was clicked it keeps a
// light copy of the page: no more of a node than its name can come from.

import { clock, place, words } from './api.js';

const FULL = 2, INCREMENTAL = 3, META = 4, CUSTOM = 5;
const MUTATION = 0, POINTER = 2, INPUT = 5, CLICK = 2;
const MOVES = [1, 2, 6, 12, 14]; // mouse, touch, drag, selection: nothing that a click has brought about
export const IDLE_MS = 10000; // what counts as inactivity
const RAGE_MS = 1000, RAGE_PX = 30, RAGE = 3;
const DEAD_MS = 3000;
const SYNTHETIC_MS = 30; // a label passes its click on to its control
const LONGEST = 80; // characters of a name
const LOST = 'From here on the page was too large to be recorded';

const NAMING = ['id', 'for', 'name', 'type', 'role', 'alt', 'title', 'class', 'placeholder', 'aria-label', 'aria-labelledby'];
const CLICKABLE = /^(a|button|label|summary|input|select|textarea|option|video|audio)$/;
const ROLE = /^(button|link|tab|menuitem|option|checkbox|radio|switch)/;
const CONTROL = /^(input|select|textarea)$/;
const BUTTON = /^(button|submit|reset|image)$/;
const WORDLESS = /^(script|style|noscript|option|select|textarea|head)$/; // no label stands in there
const ANSWERING = /^(input|select|textarea|label|option|video|audio|iframe)$/; // they answer without a mutation

const isObject = (v) => v !== null && typeof v === 'object';
const list = (v) => (Array.isArray(v) ? v.filter(isObject) : []);
const tidy = (text) => text.replace(/\s+/g, ' ').trim();

// What the tracker notes of focus and the like is no answer of the page.
const isNote = ({ adds, removes, texts, attributes }) => [adds, removes, texts].every((all) => list(all).length === 0)
  && list(attributes).every((a) => Object.keys(a.attributes ?? {}).every((name) => name.startsWith('replay-')));
const isAnswer = ({ type, data }) => type !== INCREMENTAL
  || (data.source === MUTATION ? !isNote(data) : !MOVES.includes(data.source));

// What rrweb's recorder calls user interaction: mouse, scroll, resize, input.
export const isInteraction = (e) => e.type === INCREMENTAL && e.data.source > MUTATION && e.data.source <= INPUT;

export class Story {
  constructor() {
    this.nodes = new Map(); // by id: {tag, attributes, text, parent, children}
    this.href = null;
    this.active = null; // time of the newest interaction
    this.clicks = null; // the newest click and those that it goes on from: {node, x, y, times, moment}
    this.field = null; // the control that is being filled in
  }

  // take reads one event and adds what it tells to moments.
  take(e, moments) {
    const tell = (kind, text, more) => {
      const moment = { key: `${kind} ${e.timestamp} ${text}`, kind, time: e.timestamp, text, ...more };
      moments.push(moment);
      return moment;
    };
    if (e.type !== CUSTOM || e.data.tag !== 'gap') this.pass(e, moments); // a gap is no inactivity
    if (e.type === META) this.went(e.data.href, '', tell);
    else if (e.type === FULL) this.look(e.data.node, tell);
    else if (e.type === CUSTOM) this.custom(e.data, tell);
    else if (e.type !== INCREMENTAL) return;
    else if (e.data.source === MUTATION) this.mutate(e.data);
    else if (e.data.source === POINTER && e.data.type === CLICK) this.click(e, tell);
    else if (e.data.source === INPUT) this.input(e.data, tell);
  }

  // pass notes inactivity, which grows, and clicks that nothing came of.
  pass(e, moments) {
    const { timestamp: now } = e, { clicks } = this;
    if (clicks && now > clicks.times.at(-1) + DEAD_MS) {
      if (clicks.unanswered) moments.push(Object.assign(clicks.moment, { dead: true }));
      clicks.unanswered = false;
    } else if (clicks && isAnswer(e)) {
      clicks.unanswered = false;
    }
    this.active ??= now;
    if (now - this.active >= IDLE_MS) {
      const key = `idle ${this.active}`;
      const known = moments.findLast((m) => m.key === key);
      if (known) known.to = now;
      else moments.push({ key, kind: 'idle', time: this.active, to: now, text: 'No activity' });
    }
    if (isInteraction(e)) this.active = now;
  }

  went(href, title, tell) {
    const text = words(href);
    if (text === this.href) return;
    this.page = tell('navigation', place(text), { href: text, title: words(title), first: this.href === null });
    this.href = text;
    this.field = null;
  }

  custom({ tag, payload }, tell) {
    if (tag === 'navigation') return this.went(payload?.href, payload?.title, tell);
    if (tag === 'title') return this.call(payload?.title, tell);
    if (tag === 'too-large') return tell('gap', LOST, { lost: `${LOST}.` });
    if (tag === 'visibility') return tell('visibility', payload?.hidden ? 'Tab hidden' : 'Tab shown again');
    if (tag !== 'gap') return tell('event', words(tag) || 'Event', { detail: tidy(words(payload)).slice(0, 2000) });
    const ms = payload?.to - payload?.from;
    const gap = tell('gap', ms > 0 ? `A gap of ${clock(ms)}` : 'A gap');
    if (ms > 0) Object.assign(gap, { time: gap.time - ms, to: gap.time });
    this.active = gap.to ?? gap.time;
    return gap;
  }

  click({ data, timestamp }, tell) {
    const { id, x = 0, y = 0 } = data, last = this.clicks;
    this.field = null;
    if (last && timestamp - last.times.at(-1) < SYNTHETIC_MS) return;
    if (last && timestamp - last.times.at(-1) <= RAGE_MS && Math.hypot(x - last.x, y - last.y) <= RAGE_PX) {
      last.times.push(timestamp);
      const rage = last.moment.rage || timestamp - last.times.at(-RAGE) <= RAGE_MS;
      tell('click', last.moment.text, Object.assign(last.moment, { n: last.times.length, rage }));
      last.unanswered = last.answerable;
      return;
    }
    const node = this.clickable(id);
    const answerable = !ANSWERING.test(node?.tag) || BUTTON.test(node.attributes.type);
    const moment = tell('click', this.name(node) || 'something', { on: id });
    this.clicks = { x, y, times: [timestamp], moment, answerable, unanswered: answerable };
  }

  // input tells that something was typed or chosen, once until something else
  // is; a click into the control becomes that. What was typed is nobody's.
  input({ id, text }, tell) {
    const node = this.nodes.get(id);
    if (id === this.field || !node || /^(checkbox|radio)$/.test(node.attributes.type) || text === '') return;
    this.field = id;
    const key = this.clicks?.moment.on === id && !this.clicks.moment.rage ? { key: this.clicks.moment.key } : {};
    tell('input', this.name(node) || 'a field', { ...key, n: 1, chosen: node.tag === 'select' });
  }

  // The copy of the page.

  look(root, tell) {
    this.nodes.clear();
    this.grow(root, null);
    this.call(this.textOf(this.find((n) => n.tag === 'title')), tell);
  }

  // call gives the page that is on a name.
  call(title, tell) {
    if (this.page && title) tell('navigation', this.page.text, Object.assign(this.page, { title: words(title) }));
  }

  // grow adds a tree. A loop, not recursion: how deep it is, is for the page to say.
  grow(root, parent) {
    for (const open = [[root, parent]]; open.length > 0;) {
      const [given, above] = open.pop();
      if (!isObject(given)) continue;
      const attributes = {}, theirs = isObject(given.attributes) ? given.attributes : {};
      for (const name of NAMING) if (typeof theirs[name] === 'string') attributes[name] = theirs[name];
      const tag = words(given.tagName).toLowerCase();
      if (BUTTON.test(attributes.type) && tag === 'input') attributes.value = words(theirs.value);
      const children = list(given.childNodes);
      this.nodes.set(given.id, { tag, attributes, text: words(given.textContent), parent: above, children: children.map((c) => c.id) });
      for (const child of children) open.push([child, given.id]);
    }
  }

  mutate({ removes, adds, texts, attributes }) {
    for (const { id, parentId } of list(removes)) this.prune(id, parentId);
    for (const { node, parentId, nextId } of list(adds)) {
      const siblings = this.nodes.get(parentId)?.children;
      if (!siblings || !isObject(node)) continue;
      const at = siblings.indexOf(nextId);
      siblings.splice(at < 0 ? siblings.length : at, 0, node.id);
      this.grow(node, parentId);
    }
    for (const { id, value } of list(texts)) if (this.nodes.has(id)) this.nodes.get(id).text = words(value);
    for (const { id, attributes: changed } of list(attributes)) {
      const mine = this.nodes.get(id)?.attributes;
      if (mine && isObject(changed)) for (const name of NAMING) if (name in changed) mine[name] = words(changed[name]);
    }
  }

  prune(id, parentId) {
    const parent = this.nodes.get(parentId);
    if (parent) parent.children = parent.children.filter((child) => child !== id);
    for (const open = [id]; open.length > 0;) {
      const gone = open.pop();
      open.push(...(this.nodes.get(gone)?.children ?? []));
      this.nodes.delete(gone);
    }
  }

  // Names.

  // clickable is what a person would say was clicked: the button, not the icon in it.
  clickable(id) {
    const found = this.nodes.get(id);
    for (let node = found; node; node = this.nodes.get(node.parent)) {
      if (CLICKABLE.test(node.tag) || ROLE.test(node.attributes.role)) return node;
    }
    return found;
  }

  name(node) {
    if (!node) return '';
    const a = node.attributes;
    const labelled = a['aria-labelledby'] ? this.textOf(this.find((n) => n.attributes.id === a['aria-labelledby'])) : '';
    const own = CONTROL.test(node.tag) ? a.value || this.labelOf(node) || a.placeholder || a.name : this.textOf(node);
    const name = tidy(a['aria-label'] || labelled || own || a.alt || a.title || this.pictured(node) || '');
    if (/^[*\s]+$/.test(name)) return 'masked text';
    return name ? `“${name.length > LONGEST ? `${name.slice(0, LONGEST - 1)}…` : name}”` : this.described(node);
  }

  described({ tag, attributes }) {
    const more = attributes.id ? `#${attributes.id}` : attributes.class ? `.${tidy(attributes.class).split(' ')[0]}` : '';
    return (CONTROL.test(tag) ? `${attributes.type || tag} field` : `<${tag || 'page'}${more}>`).slice(0, LONGEST);
  }

  labelOf(node) {
    const { id } = node.attributes;
    const label = id && this.find((n) => n.tag === 'label' && n.attributes.for === id);
    if (label) return this.textOf(label);
    for (let up = this.nodes.get(node.parent); up; up = this.nodes.get(up.parent)) if (up.tag === 'label') return this.textOf(up);
    return '';
  }

  // pictured is the name of a picture in the node.
  pictured(node) {
    for (const inner of this.within(node)) {
      const { alt, title, 'aria-label': label } = inner.attributes;
      if (alt || title || label) return alt || title || label;
    }
    return '';
  }

  find(suits) {
    for (const node of this.nodes.values()) if (suits(node)) return node;
    return undefined;
  }

  textOf(node) {
    let text = '';
    for (const inner of node ? this.within(node) : []) {
      text += `${inner.text} `;
      if (text.length > 2 * LONGEST) break;
    }
    return tidy(text);
  }

  // within gives what can be read in a node, in its order.
  * within(node) {
    for (const open = [node]; open.length > 0;) {
      const next = open.pop();
      yield next;
      for (const id of next.children.toReversed()) {
        const child = this.nodes.get(id);
        if (child && !WORDLESS.test(child.tag)) open.push(child);
      }
    }
  }
}
