// A scene is one rrweb Replayer and the window of events it holds. It begins at
// a full snapshot; pieces are added at its end and dropped at its beginning.

import { el } from './api.js';
import { Cleaner, mediaOrigins } from './events.js';
import { calm, Picture } from './picture.js';
import { FULL } from './story.js';

// A Replayer that one bad event cannot stop: an exception in its timer would
// end the replay without a word.
function tolerantReplayer(events, root, picture, onBroken) {
  const tolerant = (work) => (...args) => { try { work(...args); } catch { onBroken(); } };
  class Tolerant extends window.rrwebReplay.Replayer {
    applyIncremental = tolerant((event, isSync) => {
      this.forgetDocuments(event.data);
      super.applyIncremental(event, isSync);
    });
    rebuildFullSnapshot = tolerant((...args) => {
      picture.reset();
      super.rebuildFullSnapshot(...args);
    });
    moveAndHover = tolerant((...args) => super.moveAndHover(...args));
    hoverElements = (node) => picture.hover(node);
    // A frame's document that is written anew has the id of the old one, which
    // rrweb takes for a reason to leave that in place.
    forgetDocuments({ adds }) {
      for (const add of adds ?? []) {
        const old = add?.node?.type === 0 && this.mirror.getNode(add.node.id);
        if (old) this.mirror.removeNodeFromMap(old);
      }
    }
  }
  return new Tolerant(events, {
    root,
    plugins: [{ onBuild: tolerant(picture.onBuild.bind(picture)), handler: tolerant(picture.handler.bind(picture)) }],
    // With liveMode the Replayer's clock goes on when events run out, so that
    // more can follow: the end of a session is the player's to decide.
    liveMode: true,
    // rrweb's virtual DOM makes recorded nodes in this document, where scripts
    // may run, before it moves them into the sandboxed frame. Without it they
    // are only ever made inside; seeking costs about the same.
    useVirtualDom: false,
    triggerFocus: false, // the keyboard stays with the player
    showWarning: false,
    // A browser adds controls where no script may run, and a focus ring where the focus is.
    insertStyleRules: ['video::-webkit-media-controls { display: none !important; }',
      ':where([replay-state~="focus-visible"]) { outline: auto 1px -webkit-focus-ring-color }'],
    mouseTail: !calm.matches && { duration: 500, lineWidth: 2, strokeStyle: '#4950f6' },
  });
}

// On top of the page's policy, which must allow the page's own scripts, styles
// and requests: recorded nodes have none of these, not even to this server.
const media = mediaOrigins.join(' ');
const FRAME_POLICY = `default-src 'none'; style-src 'unsafe-inline' ${media}; img-src data: ${media}; `
  + `font-src data: ${media}; media-src ${media || "'none'"}`;

function restrict(iframe) {
  const { contentDocument } = iframe;
  const policy = contentDocument.createElement('meta');
  Object.assign(policy, { httpEquiv: 'Content-Security-Policy', content: FRAME_POLICY });
  contentDocument.head.append(policy); // it outlives the nodes that a snapshot replaces
  iframe.inert = true;
  iframe.title = 'The recorded page';
}

export class Scene {
  // on: {mark(moment), note(text), …}
  constructor(stage, viewport, on) {
    Object.assign(this, { stage, on });
    this.root = stage.appendChild(el('div', { className: 'scene' }));
    this.onBroken = () => on.note('A part of this recording is damaged and is not shown.');
    this.picture = new Picture((n) => {
      const which = n === 1 ? 'A style sheet' : `${n} style sheets`;
      this.lack = n > 0 ? `${which} of this page could not be recorded.` : ''; // what stays to be said
      if (this.lack) on.note(this.lack);
    }, this.onBroken);
    this.cleaner = new Cleaner(viewport, on.mark);
    this.pieces = []; // {bytes, events, end}: what the window is made of
    this.next = null; // index of the first event behind the window
  }

  // add appends a piece.
  add({ from, events: raw, next, bytes }) {
    const before = this.end, events = this.cleaner.take(raw), to = events[0]?.timestamp;
    if (this.next !== null && from > this.next) {
      this.on.mark({ key: `gap ${from}`, time: before ?? this.end, to, kind: 'gap', text: 'A gap' });
    }
    this.next = next;
    this.pieces.push({ bytes, events: events.length, end: this.end });
    if (this.replayer) for (const e of events) this.replayer.addEvent(e);
    else this.begin(events);
  }

  begin(events) {
    this.replayer = tolerantReplayer(events, this.root, this.picture, this.onBroken);
    restrict(this.replayer.iframe);
    this.replayer.on('resize', (size) => {
      this.size = size;
      this.fit();
    });
  }

  // fit scales the recorded page into the stage.
  fit() {
    if (!this.size) return;
    const { width, height } = this.size;
    this.stage.style.setProperty('--shape', width / height);
    const scale = Math.min(this.stage.clientWidth / width, this.stage.clientHeight / height, 1);
    Object.assign(this.replayer.wrapper.style, {
      width: `${width}px`, height: `${height}px`, transform: `translate(-50%, -50%) scale(${scale})`,
    });
  }

  get events() { return this.replayer.service.state.context.events; }
  get start() { return this.events[0].timestamp; }
  get end() { return this.cleaner.last; }
  get time() { return this.start + this.replayer.getCurrentTime(); }

  // Rounded up, because half a step back makes the Replayer rebuild everything.
  play(time = this.time) { this.replayer.play(Math.ceil(time) - this.start); }

  // Without a time it stops where it is; with one it shows that moment. The
  // Replayer applies what is before a time: what happened at it belongs to it.
  pause(time) {
    if (time === undefined) this.replayer.pause();
    else this.replayer.pause(time - this.start + 1);
  }

  setSpeed(speed) { this.replayer.setConfig({ speed }); }

  // covers tells whether the window is enough to show a time: there is a full
  // snapshot to begin from, or it lies ahead of what is shown.
  covers(time) {
    if (time > this.end) return false;
    return time >= this.time || this.events.some((e) => e.type === FULL && e.timestamp <= time);
  }

  bytesAfter(time) { return this.pieces.reduce((sum, p) => sum + (p.end > time ? p.bytes : 0), 0); }

  // trim drops whole pieces that have been played, oldest first, as long as the
  // window is larger than limit. The Replayer needs them for going back only,
  // and going back behind the window begins a new scene.
  trim(time, limit) {
    while (this.pieces.length > 1 && this.pieces[0].end < time && this.bytesAfter(-Infinity) > limit) {
      const gone = this.pieces.shift();
      this.events.splice(0, Math.min(gone.events, this.events.length - 1));
    }
  }

  destroy() {
    this.replayer?.destroy();
    this.root.remove();
  }
}
