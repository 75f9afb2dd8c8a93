// What happened in a session, in words: pages, clicks, inputs, events, gaps.
//
// A Story reads well-formed events in their order, from a full snapshot on, and
// tells moments: {key, kind, time, text, …}. A moment that is told again under
// its key replaces what was known of it. To name what was clicked it keeps a
// light copy of the page: no more of a node than its name can come from.

import { clock, place, words } from './api.js';

export const FULL = 2, INCREMENTAL = 3, META = 4, CUSTOM = 5;
export const MUTATION = 0, POINTER = 2, INPUT = 5;
const CLICK = 2;
const MOVES = [1, 2, 6, 12, 14]; // mouse, touch, drag, selection: nothing that a click has brought about
export const IDLE_MS = 10000; // what counts as inactivity
const RAGE_MS = 1000, RAGE_PX = 30, RAGE = 3;
const DEAD_MS = 3000;
const SYNTHETIC_MS = 30; // a label passes its click on to its control
const LONGEST = 80; // characters of a name
const LOST = 'From here on the page was too large to be recorded';

const NAMING = 'id for name type role alt title class placeholder aria-label aria-labelledby'.split(' ');
const CLICKABLE = 'a, button, label, summary, input, select, textarea, option, video, audio, [role=button], '
  + '[role=link], [role=tab], [role^=menuitem], [role=option], [role=checkbox], [role=radio], [role=switch]';
const CONTROL = 'input, select, textarea';
const BUTTON = '[type=button], [type=submit], [type=reset], [type=image]';
const SWITCH = '[type=checkbox], [type=radio]';
const PICTURED = '[alt]:not([alt=""]), [title]:not([title=""]), [aria-label]:not([aria-label=""])';
const WORDLESS = 'script, style, noscript, option, textarea'; // no label stands in there
const ANSWERING = `label, option, video, audio, iframe, :is(${CONTROL}):not(${BUTTON})`; // without a mutation

export const isObject = (v) => v !== null && typeof v === 'object';
export const list = (v) => (Array.isArray(v) ? v.filter(isObject) : []);
const tidy = (text) => text.replace(/\s+/g, ' ').trim();
const textOf = (node) => tidy(node?.textContent.slice(0, 1000) ?? '');

// What the tracker notes of focus and the like is no answer of the page.
const isNote = ({ adds, removes, texts, attributes }) => [adds, removes, texts].every((all) => list(all).length === 0)
  && list(attributes).every((a) => Object.keys(a.attributes ?? {}).every((name) => name.startsWith('replay-')));
const isAnswer = ({ type, data }) => type !== INCREMENTAL
  || (data.source === MUTATION ? !isNote(data) : !MOVES.includes(data.source));

// What rrweb's recorder calls user interaction: mouse, scroll, resize, input.
export const isInteraction = (e) => e.type === INCREMENTAL && e.data.source > MUTATION && e.data.source <= INPUT;

// copy makes a node of the copy. Elements of no namespace do nothing and load
// nothing, and no field's name hides their methods.
function copy({ type, tagName, attributes, textContent }) {
  if (type === 3) return document.createTextNode(`${words(textContent)} `);
  const tag = words(tagName).toLowerCase();
  const node = document.createElementNS(null, /^[a-z][\w-]*$/.test(tag) ? tag : 'page');
  name(node, attributes);
  if (node.matches(`input:is(${BUTTON})`)) node.setAttribute('value', words(attributes.value));
  return node;
}

function name(node, attributes) {
  if (node?.nodeType !== 1 || !isObject(attributes)) return;
  for (const key of NAMING) if (Object.hasOwn(attributes, key)) node.setAttribute(key, words(attributes[key]));
}

export class Story {
  constructor(onMoment) {
    this.onMoment = onMoment;
    this.nodes = new Map(); // of the copy, by id
    this.ids = new WeakMap();
    this.href = null;
    this.active = null; // time of the newest interaction
    this.clicks = null; // the newest click and those that it goes on from: {x, y, times, moment, …}
    this.field = null; // the control that is being filled in
  }

  // take reads one event.
  take(e) {
    const { type, data } = e;
    this.now = e.timestamp;
    if (type !== CUSTOM || data.tag !== 'gap') this.pass(e); // a gap is no inactivity
    if (type === META) this.went(data.href, '');
    else if (type === FULL) this.look(data.node);
    else if (type === CUSTOM) this.custom(data);
    else if (type !== INCREMENTAL) return;
    else if (data.source === MUTATION) this.mutate(data);
    else if (data.source === POINTER && data.type === CLICK) this.click(data);
    else if (data.source === INPUT) this.input(data);
  }

  tell(kind, text, more) {
    const moment = { key: `${kind} ${this.now} ${text}`, kind, time: this.now, text, ...more };
    this.onMoment(moment);
    return moment;
  }

  // pass notes clicks that nothing came of, and inactivity, which grows by a
  // second at a time.
  pass(e) {
    const { now, clicks } = this;
    const isDead = clicks && now > clicks.times.at(-1) + DEAD_MS;
    if (isDead && clicks.unanswered) this.onMoment(Object.assign(clicks.moment, { dead: true }));
    if (isDead || clicks && isAnswer(e)) clicks.unanswered = false;
    this.active ??= now;
    if (now - this.active >= IDLE_MS && (isInteraction(e) || !(now - this.told < 1000))) {
      this.tell('idle', 'No activity', { key: `idle ${this.active}`, time: this.active, to: now });
      this.told = now;
    }
    if (isInteraction(e)) this.active = now;
  }

  went(href, title) {
    const text = words(href);
    if (text === this.href) return;
    this.page = this.tell('navigation', place(text), { href: text, title: words(title), first: this.href === null });
    this.href = text;
    this.field = null;
  }

  custom({ tag, payload }) {
    if (tag === 'navigation') this.went(payload?.href, payload?.title);
    else if (tag === 'title') this.call(payload?.title);
    else if (tag === 'too-large') this.tell('gap', LOST, { lost: `${LOST}.` });
    else if (tag === 'visibility') this.tell('visibility', payload?.hidden ? 'Tab hidden' : 'Tab shown again');
    else if (tag === 'gap') this.gap(payload?.to - payload?.from);
    else this.tell('event', words(tag) || 'Event', { detail: tidy(words(payload)).slice(0, 2000) });
  }

  gap(ms) {
    this.active = this.now;
    if (ms > 0) this.tell('gap', `A gap of ${clock(ms)}`, { time: this.now - ms, to: this.now });
    else this.tell('gap', 'A gap');
  }

  click({ id, x = 0, y = 0 }) {
    const { now, clicks: last } = this, since = now - last?.times.at(-1);
    this.field = null;
    if (since < SYNTHETIC_MS) return;
    if (since <= RAGE_MS && Math.hypot(x - last.x, y - last.y) <= RAGE_PX) {
      last.times.push(now);
      const rage = last.moment.rage || now - last.times.at(-RAGE) <= RAGE_MS;
      this.onMoment(Object.assign(last.moment, { n: last.times.length, rage }));
      last.unanswered = last.answerable;
      return;
    }
    const found = this.nodes.get(id), node = found?.nodeType === 3 ? found.parentNode : found;
    const clicked = node?.closest(CLICKABLE) ?? node; // the button, not the icon in it
    const answerable = !clicked?.matches(ANSWERING);
    const moment = this.tell('click', this.name(clicked) || 'something', { on: id });
    this.clicks = { x, y, times: [now], moment, answerable, unanswered: answerable };
  }

  // input tells that something was typed or chosen, once until another control is used;
  // the moment of a click into the control becomes that of the input.
  input({ id, text }) {
    const node = this.nodes.get(id), last = this.clicks?.moment;
    if (id === this.field || text === '' || node?.nodeType !== 1 || node.matches(SWITCH)) return;
    this.field = id;
    const key = last?.on === id && !last.rage ? { key: last.key } : {};
    this.tell('input', this.name(node), { ...key, n: 1, chosen: node.localName === 'select' });
  }

  // The copy of the page.

  look(root) {
    this.nodes.clear();
    this.root = copy({});
    this.grow(root, this.root);
    this.call(textOf(this.root.querySelector('title')));
  }

  // call gives the current page its title.
  call(title) {
    if (this.page && title) this.onMoment(Object.assign(this.page, { title: words(title) }));
  }

  // grow adds a tree. A loop, not recursion: how deep it is, is for the page to say.
  grow(root, parent, next = null) {
    for (const open = [[root, parent, next]]; open.length > 0;) {
      const [given, above, before] = open.pop(), node = copy(given);
      if (node.nodeType === 3 && above.matches(WORDLESS)) continue;
      above.insertBefore(node, before);
      this.nodes.set(given.id, node);
      this.ids.set(node, given.id);
      const children = node.nodeType === 1 ? list(given.childNodes) : [];
      for (const child of children.reverse()) open.push([child, node, null]);
    }
  }

  mutate({ removes, adds, texts, attributes }) {
    for (const { id } of list(removes)) this.prune(this.nodes.get(id));
    for (const { node, parentId, nextId } of list(adds)) {
      const parent = this.nodes.get(parentId), next = this.nodes.get(nextId);
      if (parent?.nodeType === 1 && isObject(node)) this.grow(node, parent, next?.parentNode === parent ? next : null);
    }
    for (const { id, value } of list(texts)) {
      const node = this.nodes.get(id);
      if (node?.nodeType === 3) node.data = `${words(value)} `;
    }
    for (const { id, attributes: changed } of list(attributes)) name(this.nodes.get(id), changed);
  }

  prune(node) {
    if (!node) return;
    const walker = document.createTreeWalker(node);
    do this.nodes.delete(this.ids.get(walker.currentNode)); while (walker.nextNode());
    node.remove();
  }

  name(node) {
    if (!node) return '';
    const given = (key) => node.getAttribute(key);
    const find = (key, id) => id && textOf(this.root.querySelector(`[${key}="${CSS.escape(id)}"]`));
    const own = !node.matches(CONTROL) ? textOf(node) : given('value') || find('for', given('id'))
      || textOf(node.closest('label')) || given('placeholder') || given('name');
    const pictured = node.querySelector(PICTURED);
    const names = [given('aria-label'), find('id', given('aria-labelledby')), own, given('alt'), given('title'),
      pictured?.getAttribute('alt'), pictured?.getAttribute('title'), pictured?.getAttribute('aria-label')];
    const text = tidy(names.find(Boolean) ?? '');
    if (/^[*\s]+$/.test(text)) return 'masked text';
    return text ? `“${text.length > LONGEST ? `${text.slice(0, LONGEST - 1)}…` : text}”` : this.described(node);
  }

  described(node) {
    const { localName, id, classList } = node;
    const more = id ? `#${id}` : classList.length > 0 ? `.${classList[0]}` : '';
    const isControl = node.matches(CONTROL);
    return (isControl ? `${node.getAttribute('type') || localName} field` : `<${localName}${more}>`).slice(0, LONGEST);
  }
}
