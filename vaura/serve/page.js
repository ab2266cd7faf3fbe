// Players whose spectrogram follows the picture, and a player for sound that is still being made.
(() => {
  "use strict";
  const each = (root, name, work) => root.querySelectorAll(name).forEach(work);
  const all = () => [...document.querySelectorAll(".va-card video")];

  function ready(card) {
    card.dataset.ready = "yes";
    const find = name => card.querySelector(name);
    const video = find("video"), button = find(".va-play"), range = find("input"), head = find(".va-head"), clock = find("time");
    const length = () => Number(range ? range.max : video.duration) || 0;
    const show = () => {
      const now = Math.min(video.currentTime, length());
      if (range) {
        head.style.left = 100 * now / length() + "%";
        head.hidden = now === 0;
        range.value = now;
        range.setAttribute("aria-valuetext", now.toFixed(2) + " seconds");
      }
      clock.textContent = (now || length()).toFixed(2) + " s";
    };
    const follow = () => { show(); if (!video.paused) requestAnimationFrame(follow); };
    const toggle = () => { if (video.paused) video.play(); else video.pause(); };
    const state = playing => () => {
      card.classList.toggle("playing", playing);
      button.querySelector("span").textContent = playing ? "Pause" : "Play";
    };
    button.addEventListener("click", toggle);
    video.addEventListener("click", toggle);
    video.addEventListener("play", () => {
      all().forEach(other => { if (other !== video) other.pause(); });
      live.hush();
      state(true)();
      follow();
    });
    video.addEventListener("pause", state(false));
    video.addEventListener("ended", state(false));
    video.addEventListener("seeked", show);
    video.addEventListener("loadedmetadata", show);
    if (range) range.addEventListener("input", () => { video.currentTime = Number(range.value); });
  }

  const live = {
    id: null, context: null, zero: null, end: 0, got: 0, said: null, paused: false, over: false, sources: [],

    stage() { return document.querySelector("#va-stage"); },

    reset(said) {
      this.close();
      Object.assign(this, {id: said.id, zero: null, end: 0, got: 0, said, paused: false, over: false, sources: []});
    },

    close() {
      this.sources.forEach(source => { try { source.stop(); } catch { /* has ended */ } });
      if (this.context) this.context.close();
      this.context = null;
      clearInterval(this.timer);
      const stage = this.stage();
      if (stage) stage.replaceChildren();
    },

    hush() { if (this.context && !this.paused) this.toggle(); },

    open() {
      this.context = new AudioContext();
      const stage = this.stage(), box = document.createElement("article");
      box.className = "va-card va-live";
      box.setAttribute("aria-label", "Live");
      box.innerHTML = '<div class="va-top"><h3>Live</h3><p>The first sample, while the rest is being made.</p></div>' +
        '<div class="va-screen"><video muted playsinline preload="auto"></video><div class="va-buffer"><i></i><b></b></div></div>' +
        '<div class="va-foot"><button type="button" class="va-play"><span>Pause</span></button><time></time></div>';
      box.dataset.ready = "yes";
      stage.replaceChildren(box);
      this.video = box.querySelector("video");
      this.video.muted = true;
      this.video.src = this.said.picture;
      box.querySelector("button").addEventListener("click", () => this.toggle());
      all().forEach(other => { if (other !== this.video) other.pause(); });
      this.timer = setInterval(() => this.tick(), 100);
    },

    toggle() {
      this.paused = !this.paused;
      if (this.paused) { this.context.suspend(); this.video.pause(); } else {
        if (this.over) { this.again(); }
        this.context.resume();
      }
      this.tick();
    },

    again() {
      this.over = false;
      this.zero = this.context.currentTime + 0.1;
      this.sources = [];
      this.buffers.forEach(([buffer, begin]) => this.play(buffer, begin));
    },

    position() { return this.zero === null ? 0 : Math.max(0, this.context.currentTime - this.zero); },

    play(buffer, begin) {
      const source = this.context.createBufferSource();
      source.buffer = buffer;
      source.connect(this.context.destination);
      source.start(this.zero + begin);
      this.sources.push(source);
    },

    async take(said) {
      if (said.id !== this.id) this.reset(said);
      this.said = said;
      if (this.reading) return;
      this.reading = true;
      try {
        while (this.said.id === this.id && this.got < this.said.pieces.length) {
          const id = this.id, [address, begin, length] = this.said.pieces[this.got];
          if (!this.context) { this.open(); this.buffers = []; }
          const answer = await fetch(address);
          if (!answer.ok) return;
          const buffer = await this.context.decodeAudioData(await answer.arrayBuffer());
          if (id !== this.id) continue;
          const now = this.context.currentTime;
          // what comes too late is not cut: all that follows waits for it, the picture too
          if (this.zero === null || this.zero + begin < now) this.zero = now + 0.15 - begin;
          this.buffers.push([buffer, begin]);
          this.play(buffer, begin);
          this.end = begin + length;
          this.got += 1;
        }
      } finally { this.reading = false; }
    },

    tick() {
      if (!this.context || this.zero === null) return;
      const at = Math.min(this.position(), this.end), stage = this.stage();
      if (!stage || !stage.firstChild) return;
      const total = this.said.done ? this.end : Math.max(this.video.duration || 0, this.end);
      const whole = this.said.done && this.got === this.said.pieces.length;
      if (whole && at >= this.end && !this.over) { this.over = true; this.paused = true; this.video.pause(); }
      const going = !this.paused && this.context.state === "running" && at < this.end;
      if (Math.abs(this.video.currentTime - at) > 0.12 && this.video.readyState > 0) this.video.currentTime = at;
      if (going && this.video.paused) this.video.play().catch(() => {});
      if (!going && !this.video.paused) this.video.pause();
      const box = stage.firstChild;
      box.classList.toggle("playing", going);
      box.querySelector("button span").textContent = this.paused || this.context.state !== "running" ? "Play" : "Pause";
      box.querySelector("time").textContent = at.toFixed(2) + " / " + total.toFixed(2) + " s";
      box.querySelector(".va-buffer i").style.width = 100 * this.end / total + "%";
      box.querySelector(".va-buffer b").style.width = 100 * at / total + "%";
      stage.dataset.position = at.toFixed(2);
      stage.dataset.heard = Math.max(Number(stage.dataset.heard || 0), at).toFixed(2);
    },
  };

  function look() {
    each(document, '.va-card:not([data-ready])', ready);
    const feed = document.querySelector("#va-feed");
    if (feed && feed.dataset.feed) {
      const said = JSON.parse(feed.dataset.feed);
      if (said.pieces.length || said.id !== live.id) live.take(said);
    } else if (live.id) { live.close(); live.id = null; }
  }
  let asked = false;
  new MutationObserver(() => {
    if (!asked) { asked = true; queueMicrotask(() => { asked = false; look(); }); }
  }).observe(document.documentElement, {childList: true, subtree: true, attributes: true, attributeFilter: ["data-feed"]});
  look();
})();
