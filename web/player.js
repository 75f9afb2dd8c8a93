// The player: a play head over a recording of any length.
//
// Memory stays bounded, however long the session: only a window of it is here,
// from the full snapshot before the play head to at most a minute's playing or about
// 8 MB of JSON ahead of it; from 24 MB on, what has been played is dropped (trim).
// Seeking outside the window builds a new scene from the last full snapshot
// before the target and shows it when it is ready.

import { clock } from './api.js';
import { Cleaner } from './events.js';
import { Scene } from './scene.js';
import { IDLE_MS, isInteraction } from './story.js';

const AHEAD_MS = 60000, AHEAD_BYTES = 8 << 20, WINDOW_BYTES = 24 << 20;
// Trackers send every 500 ms, and rrweb gathers mouse moves for 500 ms more:
// this far behind the recorded page, live replay always has the next event.
const LIVE_DELAY = 1000;

export class Player {
  // on: {change(), mark(moment), piece(piece), gapEnd(time), note(text), failed(err)}
  constructor(recording, stage, on) {
    Object.assign(this, { recording, stage, on });
    this.state = 'loading'; // loading, waiting (for a snapshot), paused, playing, ended
    this.speed = 1;
    this.skip = true; // inactivity; gaps are skipped always
    this.following = false; // live
    this.wantsLive = true; // it follows when the session is live: at first, and one that it followed to its end
    this.wantsPlay = true;
    this.turn = 0; // raised by each seek, so that an overtaken one gives up
    setInterval(() => this.tick(), 100);
    new ResizeObserver(() => this.scene?.fit()).observe(stage);
    document.addEventListener('visibilitychange', () => this.visibility());
  }

  get time() { return this.target ?? this.scene?.time ?? this.recording.start ?? 0; }

  setState(state) {
    this.state = state;
    this.on.change();
  }

  // What people do.

  seek(time) {
    this.following = this.wantsLive = false;
    const { start, end } = this.recording;
    if (start === null) return this.goto(Infinity);
    return this.goto(Math.min(Math.max(time, start), end));
  }

  play() {
    this.wantsPlay = true;
    if (this.state === 'ended') return this.seek(this.recording.start);
    if (this.state === 'paused') this.run();
  }

  pause() {
    this.wantsPlay = this.following = this.wantsLive = false;
    if (this.state === 'playing') this.stop();
    else this.on.change();
  }

  stop() {
    this.scene.pause();
    this.setState('paused');
  }

  setSpeed(speed) {
    this.speed = speed;
    this.scene?.setSpeed(speed);
  }

  // follow goes to the live edge, and stays there. A window that reaches it
  // already is kept.
  follow() {
    this.following = this.wantsPlay = true;
    this.wantsLive = false;
    if (!this.scene || this.target !== null || this.hasMore()) return this.goto(Infinity);
    return this.arrive(Math.max(this.scene.time, this.edge));
  }

  // How it gets there.

  async goto(time) {
    const turn = ++this.turn;
    this.target = Math.min(time, this.recording.end);
    try {
      if (!this.scene?.covers(time)) {
        this.scene?.pause();
        this.setState('loading');
        const scene = await this.build(time, turn);
        if (!scene) return;
        this.scene?.destroy();
        this.scene = scene;
        scene.root.classList.add('shown');
      }
      this.arrive(this.following ? this.edge : Math.min(time, this.scene.end));
    } catch (err) {
      if (turn !== this.turn) return;
      this.target = null;
      this.wantsPlay = this.following = false;
      if (this.scene) this.setState('paused'); // with what there is
      this.on.failed(err);
    }
  }

  async build(time, turn) {
    const start = await this.recording.startBefore(time);
    if (turn !== this.turn) return null;
    if (!start) return this.setState(this.recording.isActive ? 'waiting' : 'empty');
    const scene = new Scene(this.stage, this.recording.info.metadata?.viewport, this.on);
    try {
      this.add(scene, start);
      while (scene.end <= time) {
        const piece = await this.recording.read(scene.next);
        if (turn !== this.turn) return scene.destroy();
        if (!piece) break;
        this.add(scene, piece);
        await null; // the Replayer takes added events in a microtask
        // A far target is reached in steps that each fit into the window.
        if (scene.end <= time) scene.pause(scene.end);
        scene.trim(scene.end, WINDOW_BYTES);
      }
      return scene;
    } catch (err) {
      scene.destroy();
      throw err;
    }
  }

  arrive(time) {
    const { scene } = this;
    this.target = null;
    const to = Math.max(time, scene.start);
    if (to > scene.end || scene.covers(to)) scene.pause(to); // else the window has no way back
    this.setState('paused');
    if (this.wantsPlay) this.run();
  }

  run() {
    if (document.hidden) return this.setState('paused'); // see visibility
    this.scene.setSpeed(this.following ? 1 : this.speed);
    this.scene.play();
    return this.setState('playing');
  }

  // Ten times a second.

  tick() {
    const { scene } = this;
    if (!scene || this.target !== null) return;
    const now = scene.time;
    if (this.state === 'playing') this.steer(now);
    this.readAhead();
    scene.trim(now, WINDOW_BYTES);
    // A dialog that opens in the recording takes the focus, inert or not.
    if (document.activeElement === scene.replayer.iframe) document.activeElement.blur();
    this.on.change();
  }

  steer(now) {
    const { scene } = this, gapEnd = Math.min(this.on.gapEnd(now), scene.end);
    if (this.following && now < this.edge - LIVE_DELAY) scene.play(this.edge);
    if (this.following) return;
    if (now >= scene.end) this.runOut();
    else if (gapEnd > now) scene.play(gapEnd);
    else if (this.skip) this.skipIdle(now);
  }

  // The window is played to its end: more is coming, or this is the live edge,
  // or the end of the session.
  runOut() {
    if (this.recording.isActive && this.scene.next >= this.recording.total) return this.follow();
    this.scene.pause(this.scene.end);
    if (this.hasMore()) return this.setState('loading');
    this.wantsPlay = false;
    this.setState('ended');
  }

  hasMore() { return !this.scene.exhausted && this.scene.next < this.recording.total; }

  skipIdle(now) {
    const { scene } = this;
    const next = scene.events.find((e) => e.timestamp > now && isInteraction(e))?.timestamp ?? scene.end;
    if (next - now < IDLE_MS) return;
    this.on.note(`Skipped ${clock(next - now)} without activity.`);
    scene.play(next - 1000);
  }

  async readAhead() {
    if (this.reading) return;
    this.reading = true;
    try {
      while (this.hasMore() && this.wantsAhead()) {
        const { scene } = this, { next } = scene;
        const piece = await this.recording.read(next);
        if (!piece) scene.exhausted = true;
        // Meanwhile a live batch may have brought the same events, or a seek another scene.
        else if (scene === this.scene && scene.next === next) this.add(scene, piece);
        await null; // see build
        this.resume();
      }
    } catch (err) {
      this.scene.exhausted = true;
      this.on.failed(err);
      this.resume(); // with what there is
    }
    this.reading = false;
  }

  // resume goes on after running out, once there is a second to play, or as much
  // as is read ahead: at a high speed that may be less.
  resume() {
    const { scene } = this;
    if (this.state !== 'loading' || this.target !== null) return;
    if (this.hasMore() && this.wantsAhead() && scene.end - scene.time < 1000 * this.speed) return;
    if (this.wantsPlay) this.run();
    else this.setState('paused');
  }

  wantsAhead() {
    const { time, end } = this.scene, ahead = end - time;
    return ahead < 5000 || (ahead < AHEAD_MS * Math.max(1, this.speed) && this.scene.bytesAfter(time) < AHEAD_BYTES);
  }

  // Live.

  // batch takes a live batch. One that does not join on is left to readAhead, and
  // so is one that nobody is about to see.
  batch(from, events, bytes) {
    const { scene, recording } = this;
    const end = from + events.length;
    recording.takeBatch(from, events);
    if (this.state === 'waiting') return recording.newestSnapshot >= from ? this.follow() : this.foretell(events);
    if (!scene || from > scene.next || end <= scene.next) return;
    if ((document.hidden || !this.following) && !this.wantsAhead()) return;
    this.add(scene, { from: scene.next, events: events.slice(scene.next - from), next: end, bytes });
    if (this.following) scene.setSpeed(scene.end - scene.time < LIVE_DELAY ? 0.9 : 1);
  }

  // foretell tells what happened before there is anything to show.
  foretell(events) {
    new Cleaner(null, this.on.mark).take(events);
    this.on.change();
  }

  // missed tells how many events there are, some of which no batch will bring.
  missed(total) {
    this.recording.total = Math.max(this.recording.total, total);
    if (this.scene) this.scene.exhausted = false;
  }

  // Live replay stays this far behind the newest event. Its clock goes on when none
  // comes; batches that are late slow it down, and it leaps when it is far behind.
  get edge() { return this.scene.end - LIVE_DELAY; }

  async ended() {
    this.wantsLive ||= this.following;
    this.recording.isActive = this.following = false; // at once: it may be live again before the answer comes
    this.scene?.setSpeed(this.speed);
    await this.recording.load();
    if (this.state === 'waiting') this.setState('empty');
    if (this.turn === 0) this.seek(this.recording.start); // it ended while the page opened
  }

  // A hidden page gets no animation frames: it stops, and goes on when seen.
  visibility() {
    if (!this.scene || this.target !== null) return;
    if (document.hidden) return this.state === 'playing' && this.stop();
    if (this.following) return this.follow();
    return this.wantsPlay && this.state === 'paused' && this.run();
  }

  add(scene, piece) {
    scene.add(piece);
    this.on.piece(piece);
  }
}
