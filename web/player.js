// The player: a play head over a recording of any length.
//
// Memory stays bounded, however long the session: only a window of it is here,
// from the full snapshot before the play head to at most a minute or about 8 MB
// of JSON ahead of it; from 24 MB on, what has been played is dropped (trim).
// Seeking outside the window builds a new scene from the last full snapshot
// before the target and shows it when it is ready.

import { clock } from './api.js';
import { FULL } from './events.js';
import { Scene } from './scene.js';
import { IDLE_MS, isInteraction } from './story.js';

const AHEAD_MS = 60000, AHEAD_BYTES = 8 << 20, WINDOW_BYTES = 24 << 20;
// Trackers send every 500 ms, and rrweb gathers mouse moves for 500 ms more:
// this far behind the recorded page, live replay always has the next event.
const LIVE_DELAY = 1000;

export class Player {
  // on: {change(), mark(moment), piece(piece), unseen(events), gapEnd(time), note(text), failed(err)}
  constructor(recording, stage, on) {
    Object.assign(this, { recording, stage, on });
    this.state = 'loading'; // loading, waiting (for a snapshot), paused, playing, ended
    this.speed = 1;
    this.skip = true; // inactivity; gaps are skipped always
    this.following = false; // live
    this.returns = false; // it followed when the session ended: it will when that goes on
    this.wantsPlay = true;
    this.lags = []; // of live batches: viewer's clock minus the newest event's time
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
    this.following = this.returns = false;
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
    this.wantsPlay = this.following = this.returns = false;
    if (this.state !== 'playing') return this.on.change();
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
    this.returns = false;
    if (this.scene && this.target === null && !this.hasMore()) this.arrive(Infinity);
    else this.goto(Infinity);
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
      this.arrive(time);
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
    const scene = new Scene(this.stage, this.recording.info.metadata?.viewport, this.on.note);
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
    this.lags.push(performance.now() - scene.end); // until live batches tell better
    const edge = this.following ? this.liveTime : scene.end;
    const to = Math.max(Math.min(time, edge), scene.start);
    if (to > scene.end || scene.covers(to)) scene.pause(to); // else the window has no way back
    this.setState('paused');
    if (this.wantsPlay) this.run();
  }

  run() {
    this.scene.setSpeed(this.following ? 1 : this.speed);
    if (!document.hidden) this.scene.play(); // see visibility
    this.setState('playing');
  }

  // Ten times a second.

  tick() {
    const { scene } = this;
    if (!scene || document.hidden || this.target !== null) return;
    const now = scene.time;
    if (this.state === 'playing') this.steer(now);
    this.readAhead();
    scene.trim(now, WINDOW_BYTES);
    scene.giveBackFocus();
    this.on.change();
  }

  steer(now) {
    if (this.following) this.keepUp(now);
    else if (now >= this.scene.end) this.runOut();
    else if (!this.skipGap(now) && this.skip) this.skipIdle(now);
  }

  skipGap(now) {
    const to = Math.min(this.on.gapEnd(now), this.scene.end);
    if (to > now) this.scene.play(to);
    return to > now;
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
    const next = scene.nextEvent(now, isInteraction) ?? scene.end;
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
    const { time, end } = this.scene;
    return end - time < 5000 || (end - time < AHEAD_MS * Math.max(1, this.speed) && this.scene.bytesAhead(time) < AHEAD_BYTES);
  }

  // Live.

  // batch takes a live batch. One that does not join on is left to readAhead.
  batch(from, events, bytes) {
    const { scene, recording } = this;
    const end = from + events.length;
    recording.timeline.take(from, events);
    const newest = events.reduce((max, e) => (Number.isFinite(e?.timestamp) ? Math.max(max, e.timestamp) : max), -Infinity);
    const snapshot = events.findLastIndex((e) => e?.type === FULL);
    recording.total = Math.max(recording.total, end);
    recording.end = Math.max(recording.end, newest);
    recording.start ??= recording.end;
    if (snapshot >= 0) recording.newestSnapshot = from + snapshot;
    if (newest > -Infinity) this.lags = [...this.lags.slice(-19), performance.now() - recording.end];
    if (this.state === 'waiting') return snapshot >= 0 ? this.follow() : this.on.unseen(events);
    if (!scene || from > scene.next || end <= scene.next) return;
    if (document.hidden || (!this.following && !this.wantsAhead())) return;
    this.add(scene, { from: scene.next, events: events.slice(scene.next - from), next: end, bytes });
  }

  // missed tells how many events there are, some of which no batch will bring.
  missed(total) {
    this.recording.total = Math.max(this.recording.total, total);
    if (this.scene) this.scene.exhausted = false;
  }

  // The recorded page's time now, less the delay. Only differences of its clock
  // count; the smallest lag is the one with the least waiting in it.
  get liveTime() { return performance.now() - Math.min(...this.lags) - LIVE_DELAY; }

  keepUp(now) {
    const goal = Math.max(this.liveTime, this.scene.start), drift = goal - now;
    const idle = drift > 200 && !(this.scene.nextEvent(now) <= goal); // nothing is skipped by a jump
    if (idle || drift > 2000 || (drift < -2000 && this.scene.covers(goal))) this.scene.play(goal);
    else this.scene.setSpeed(drift > 100 ? 1.1 : drift < -100 ? 0.9 : 1);
  }

  async ended() {
    this.returns ||= this.following;
    this.recording.isActive = this.following = false; // at once: it may be live again before the answer comes
    this.scene?.setSpeed(this.speed);
    await this.recording.load();
    if (this.state === 'waiting') this.setState('empty');
  }

  // A hidden page gets no animation frames: it stops, and goes on when seen.
  visibility() {
    if (!this.scene || this.target !== null) return;
    if (document.hidden) {
      if (this.state === 'playing') this.scene.pause();
    } else if (this.following) {
      this.follow();
    } else if (this.state === 'playing') {
      this.scene.play();
    }
  }

  add(scene, piece) {
    for (const moment of scene.add(piece)) this.on.mark(moment);
    this.on.piece(piece);
  }
}
