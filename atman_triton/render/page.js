"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const all = data.explanations;
  const overlay = data.overlay; // or else all are one explanation, by ever larger units
  const text = byId("text");
  const spans = [...text.querySelectorAll("[data-p]")];
  const FIRST = overlay ? 6 : 15; // rows of a ranking before "more"
  const state = { row: all.map(() => 0), on: all.map((_, k) => overlay || k === 0), shown: all.map(() => FIRST), cursor: -1, pinned: -1 };

  // Python counts code points, so strings are cut by code points here too.
  for (const e of all) {
    e.characters = Array.from(e.text);
    if (e.stops) e.prompt = e.characters.slice(0, e.stops[0]);
    e.direct = new Set(e.direct || []);
  }
  const several = !overlay && all[0].stops !== undefined;
  // Of several targets only the chosen one is in sight.
  const branches = spans.map((span) => { const node = span.closest("[data-b]"); return node ? Number(node.dataset.b) : -1; });

  const element = (tag, name, ...children) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    node.append(...children);
    return node;
  };

  // Which spans a unit lies over; units outside the shared text lie over none.
  const places = all.map(() => new Map());
  data.pieces.forEach((piece, index) => piece.forEach((units, k) => units.forEach((unit) => {
    if (!places[k].has(unit)) places[k].set(unit, []);
    places[k].get(unit).push(index);
  })));

  /* Numbers. A value is a number, or null where nothing was measured. */

  // A row is 0 for all, a target token's number from 1, behind those a part's, or -1 minus a whole
  // target's number.
  const partOf = (k, row) => (row > all[k].targets.length ? all[k].parts[row - 1 - all[k].targets.length] : null);
  const branchOf = (k, row) => {
    const e = all[k];
    if (!e.stops || row === 0) return -1;
    return row < 0 ? -1 - row : (partOf(k, row) || { branch: e.branch[row - 1] }).branch;
  };
  const unpacked = (e, { step, steps }, branch) => {
    let at = 0;
    return e.owner.map((owner) => {
      if (owner >= 0 && owner !== branch) return null;
      const value = steps[at++];
      return value === "+" ? data.infinity : value === "-" ? -data.infinity : value === null ? null : value * step;
    });
  };
  // The target tokens that a row is about, by their numbers from 1.
  const tokensOf = (k, row) => {
    const e = all[k], part = partOf(k, row);
    if (part) return part.rows.map((t) => t + 1);
    if (row > 0) return [row];
    return e.targets.flatMap((_, t) => (row === 0 || e.branch[t] === -1 - row ? [t + 1] : []));
  };
  // A target token's scores as they were measured, in nats.
  const measured = (k, token) =>
    (all[k].stops ? unpacked(all[k], all[k].rows[token], all[k].branch[token - 1]) : all[k].rows[token]);
  const POST = { none: (v) => v, absolute: Math.abs, square: (v) => v * v };
  // As ``Explanation`` reads them: processed, reduced, scaled.
  const reduced = (k, tokens) => {
    const e = all[k], sum = e.units.map(() => 0), count = e.units.map(() => 0);
    for (const token of tokens) {
      measured(k, token).forEach((value, unit) => {
        if (value !== null) { sum[unit] += POST[e.post](value); count[unit] += 1; }
      });
    }
    return sum.map((total, unit) => (count[unit] ? total / (e.reduction === "mean" ? count[unit] : 1) : null));
  };
  const scaled = (values) => {
    const finite = values.filter((v) => v !== null && Math.abs(v) < data.infinity);
    const low = finite.reduce((a, b) => Math.min(a, b), Infinity), high = finite.reduce((a, b) => Math.max(a, b), -Infinity);
    return values.map((v) => (v === null ? null : v >= data.infinity ? 1 : v <= -data.infinity ? 0 : high > low ? (v - low) / (high - low) : 0));
  };
  const valuesOf = (k, row) => {
    const e = all[k];
    if (row === 0) return e.rows[0];
    const values = reduced(k, tokensOf(k, row));
    return e.scaled ? scaled(values) : values;
  };
  const scaleOf = (k, row) => (row === 0 && all[k].contrast) || all[k].scale;

  const views = new Map();
  const view = (k) => {
    const key = k + ":" + state.row[k];
    if (!views.has(key)) {
      const values = valuesOf(k, state.row[k]);
      const order = [];
      let peak = 0;
      values.forEach((value, unit) => {
        if (value === null || !places[k].has(unit)) return;
        order.push(unit);
        if (Math.abs(value) < data.infinity) peak = Math.max(peak, Math.abs(value));
      });
      order.sort((a, b) => values[b] - values[a] || a - b);
      const rank = new Map(order.map((unit, place) => [unit, place + 1]));
      const digits = peak ? Math.max(0, Math.min(8, 2 - Math.floor(Math.log10(peak)))) : 2;
      views.set(key, { values, order, rank, peak, digits });
    }
    return views.get(key);
  };
  const strength = ({ values, peak }, unit) => {
    const value = values[unit];
    return value === null ? 0 : Math.max(-1, Math.min(1, peak ? value / peak : Math.sign(value)));
  };
  // The unit of largest magnitude, and its strength.
  const strongest = (v, units) =>
    units.map((unit) => [strength(v, unit), unit]).reduce((a, b) => (Math.abs(b[0]) > Math.abs(a[0]) ? b : a), [0, -1]);
  const number = (scale, value, digits) => {
    if (value === null) return "not measured";
    const text = Math.abs(value) >= data.infinity ? "∞" : Math.abs(value).toFixed(digits);
    return (Number(text) === 0 ? "" : value < 0 ? "−" : scale.signed ? "+" : "") + text;
  };
  const level = ({ word }, value) => (word === "probability" ? percent(value) : String(Number(value.toPrecision(3))).replace("-", "−"));
  const percent = (logprob) => {
    const p = 100 * Math.exp(logprob);
    return (p >= 10 ? p.toFixed(1) : p >= 1e-3 ? p.toPrecision(2) : p > 0 ? p.toExponential(1) : "0") + "%";
  };

  /* Words. */

  const visible = (string) => {
    const line = string.replaceAll("\n", "↵");
    const core = line.replace(/^ +| +$/g, "");
    return core || "␣".repeat(line.length) || "∅";
  };
  // Units may be whole documents: what is named of them is their start and their end.
  const shortened = (string, limit) => {
    const characters = Array.from(string);
    if (characters.length <= limit) return string;
    const end = Math.floor(limit / 4);
    return characters.slice(0, limit - end).join("") + " … " + characters.slice(-end).join("");
  };
  // The text in which the model read a unit, without other targets, and the unit's span there.
  const texts = new Map();
  const placed = (k, unit) => {
    const e = all[k], [start, stop] = e.units[unit];
    if (!e.stops) return [e.characters, start, stop];
    const end = e.stops[e.stops.length - 1];
    if (start >= end) return [e.characters.slice(end), start - end, stop - end];
    const branch = e.owner[unit];
    if (branch < 0) return [e.prompt, start, stop];
    const key = k + ":" + branch, by = e.stops[branch] - e.stops[0];
    if (!texts.has(key)) texts.set(key, e.prompt.concat(e.characters.slice(e.stops[branch], e.stops[branch + 1])));
    return [texts.get(key), start - by, stop - by];
  };
  const context = (k, unit, size) => {
    // What is drawn on a picture or along a sound has no text around it.
    if (all[k].drawn && unit in all[k].drawn) return ["", element("b", "", all[k].drawn[unit]), ""];
    const [characters, start, stop] = placed(k, unit);
    const piece = characters.slice(start, stop).join("");
    const lead = piece.trim() ? piece.length - piece.trimStart().length : 0;
    const flat = (from, to) => characters.slice(Math.max(0, from), to).join("").replaceAll("\n", " ");
    let before = flat(start - size, start + lead), after = flat(stop, stop + size);
    // Cut at whole words.
    if (start > size) before = "…" + before.replace(/^\S*\s+(?=\S)/, "");
    if (stop + size < characters.length) after = after.replace(/(\S)\s+\S*$/, "$1") + "…";
    return [before, element("b", "", shortened(visible(piece), 8 * size)), after];
  };

  /* Colours. */

  const front = () => state.on.indexOf(true);

  const paint = () => {
    const shown = all.map((_, k) => (state.on[k] ? view(k) : null));
    spans.forEach((span, index) => {
      const tops = data.pieces[index].map((units, k) => (state.on[k] ? strongest(shown[k], units) : [0, -1]));
      const levels = tops.map(([level]) => level);
      span.classList.remove("p", "n", "d", "m0", "m1", "m2", "m3", "m4", "m5");
      span.style.removeProperty("--v");
      span.style.removeProperty("background-image");
      // What is by other units, or by none in sight, must not lie in the way.
      if (span.classList.contains("box")) span.hidden = !unitsAt(index).some((units) => units.length);
      if (!overlay) {
        const [level, unit] = tops[front()];
        if (Math.abs(level) < data.weak) return;
        span.classList.add(level > 0 ? "p" : "n");
        if (all[front()].direct.has(unit)) span.classList.add("d");
        span.style.setProperty("--v", Math.abs(level).toFixed(3));
        return;
      }
      const layers = levels.map((level, k) => [level, k]).filter(([level]) => level >= data.faint);
      if (!layers.length) return;
      const share = 100 / layers.length;
      const bands = layers.map(([level, k], i) =>
        `rgb(var(--overlay${k % data.colours}) / ${level.toFixed(3)}) ${i * share}% ${(i + 1) * share}%`);
      span.style.backgroundImage = `linear-gradient(${bands.join(", ")})`;
      const [top, k] = layers.reduce((a, b) => (b[0] > a[0] ? b : a));
      if (top >= data.strong) span.classList.add("m" + (k % 6));
    });
    const scale = byId("scale");
    if (scale) {
      const { peak, digits } = shown[front()], { signed, low, high, suffix } = scaleOf(front(), state.row[front()]);
      const end = peak.toFixed(digits);
      const ends = signed ? [`−${end} ${low}`, "0", `${high} +${end}${suffix}`] : ["0", `${high} ${end}${suffix}`];
      scale.replaceChildren(...ends.map((s) => element("span", "", s)));
    }
  };

  /* One unit's numbers. */

  // Tokens that were suppressed along with the units at a place are outlined.
  const outline = (units) => {
    for (const span of text.querySelectorAll(".near")) { span.classList.remove("near"); span.removeAttribute("title"); }
    const k = front();
    if (overlay || k < 0 || !all[k].neighbours) return;
    for (const unit of units) {
      for (const [place, , factor, similarity] of all[k].neighbours[unit].shown) {
        for (const i of data.near[place] || []) {
          spans[i].classList.add("near");
          spans[i].title = `suppressed along: ×${factor}, similarity ${similarity}`;
        }
      }
    }
  };
  const NEAR = 6; // in the panel

  const describe = (index) => {
    const box = byId("detail");
    outline(index < 0 ? [] : unitsAt(index)[front()] || []);
    if (index < 0) {
      box.replaceChildren(element("p", "hint", "Point at the text, or focus it and use the arrow keys, to see numbers."));
      return;
    }
    const blocks = [];
    data.pieces[index].forEach((units, k) => {
      if (!state.on[k]) return;
      const e = all[k], v = view(k), row = state.row[k];
      for (const unit of units) {
        const value = v.values[unit];
        const list = element("dl", "");
        const add = (term, number) => list.append(element("dt", "", term), element("dd", "", number));
        const scale = scaleOf(k, row), part = partOf(k, row);
        const what = part ? `relevance for “${part.text}”` : row > 0 ? `score for “${e.targets[row - 1]}”` : "relevance";
        add(what, number(scale, value, v.digits) + (value === null ? "" : scale.suffix));
        if (value !== null) add("rank", `${v.rank.get(unit)} of ${v.order.length}`);
        const average = e.stops && row === 0; // over several targets
        const rows = tokensOf(k, row);
        const scores = average ? [null] : rows.map((r) => measured(k, r)[unit]);
        if (average && e.contrast) {
          e.names.forEach((name, b) => add(`for “${name}”`, number(e.scale, valuesOf(k, -1 - b)[unit], v.digits)));
        } else if (average) {
          add("mean of", `${e.stops.length - 1} targets`);
        } else if (!scores.includes(null)) {
          const base = rows.reduce((sum, r) => sum + e.base[r - 1], 0);
          const loss = scores.reduce((sum, score) => sum + score, 0);
          add(row > 0 ? (part ? `part’s ${e.word}` : `its ${e.word}`) : e.word === e.noun ? e.noun : `${e.noun}’s ${e.word}`, `${level(e, base)} → ${level(e, base - loss)}`);
        } else if (value === null) {
          add("why", "stands at or after the target");
        }
        if (e.levels) add("level", e.levels[unit]);
        if (e.effect !== "total") add("effect", e.effect === "direct" || e.direct.has(unit) ? "direct" : "total");
        if (e.document && e.document[unit] !== null) add("document", e.documents[e.document[unit]]);
        const { shown, count } = e.neighbours ? e.neighbours[unit] : { shown: [], count: 0 };
        shown.slice(0, NEAR).forEach(([, word, factor, similarity], i) =>
          add(i ? "" : "along with it", `${word} ×${factor} (similarity ${similarity})`));
        if (count > NEAR) add("", `and ${count - Math.min(NEAR, shown.length)} more` + (count > shown.length ? `, ${shown.length} outlined` : ""));
        const title = element("p", "context", ...context(k, unit, 34));
        if (overlay) title.prepend(letter(k), " ");
        blocks.push(title, list);
      }
    });
    const target = spans[index].dataset.t;
    if (!blocks.length) {
      blocks.push(element("p", "context", element("b", "", visible(spans[index].textContent))));
      blocks.push(element("p", "hint", target === undefined ? "Not a unit." : "A target token: choose it to see what supports it."));
    }
    box.replaceChildren(...blocks);
  };
  const letter = (k) => {
    const node = element("span", "letter", all[k].letter);
    node.style.backgroundColor = `rgb(var(--overlay${k % data.colours}))`;
    return node;
  };

  /* The ranking. */

  const light = (k, unit, on) => {
    (places[k].get(unit) || []).forEach((i) => spans[i].classList.toggle("lit", on));
    outline(on ? [unit] : state.cursor < 0 ? [] : unitsAt(state.cursor)[front()] || []);
  };

  const entry = (k, unit) => {
    const v = view(k), level = strength(v, unit);
    const fill = element("span", "fill" + (level < 0 ? " against" : ""));
    fill.style.width = (100 * Math.abs(level)).toFixed(1) + "%";
    if (overlay) fill.style.backgroundColor = `rgb(var(--overlay${k % data.colours}))`;
    const button = element("button", "row",
      element("span", "rank", String(v.rank.get(unit))), element("span", "context", ...context(k, unit, 18)),
      element("span", "number", ...(all[k].direct.has(unit) ? [element("small", "", "direct"), " "] : []), number(scaleOf(k, state.row[k]), v.values[unit], v.digits)), element("span", "track", fill));
    const owner = all[k].document && all[k].document[unit];
    if (typeof owner === "number") button.querySelector(".context").prepend(element("small", "source", all[k].documents[owner]), " ");
    button.type = "button";
    for (const name of ["mouseenter", "focus"]) button.addEventListener(name, () => light(k, unit, true));
    for (const name of ["mouseleave", "blur"]) button.addEventListener(name, () => light(k, unit, false));
    button.addEventListener("click", () => {
      const index = (places[k].get(unit) || [-1])[0];
      if (index < 0) return;
      pin(index);
      spans[index].scrollIntoView({ block: "center" });
    });
    return element("li", "", button);
  };
  const rank = () => {
    const nodes = [];
    all.forEach((e, k) => {
      if (!state.on[k]) return;
      const v = view(k);
      const supporters = v.order.filter((unit) => v.values[unit] > 0);
      const opponents = v.order.filter((unit) => strength(v, unit) <= -data.strong).reverse();
      const scale = scaleOf(k, state.row[k]);
      const title = element("h2", "", scale.titles[overlay ? "overlay" : several && state.row[k] === 0 ? "all" : "most"]);
      if (overlay) title.prepend(letter(k), " ");
      // At first only those that tell something, but never fewer than three.
      const telling = Math.max(3, supporters.filter((unit) => strength(v, unit) >= data.telling).length);
      const count = state.shown[k] > FIRST ? state.shown[k] : Math.min(FIRST, telling);
      nodes.push(title, element("ol", "list", ...supporters.slice(0, count).map((unit) => entry(k, unit))));
      if (!supporters.length) nodes.push(element("p", "hint", "No unit does."));
      if (supporters.length > count) {
        const more = element("button", "more", `Show more of ${supporters.length}`);
        more.type = "button";
        more.addEventListener("click", () => { state.shown[k] += 50; rank(); });
        nodes.push(more);
      }
      if (opponents.length && !overlay) {
        nodes.push(element("h2", "", scale.titles.against), element("ol", "list", ...opponents.slice(0, 5).map((unit) => entry(k, unit))));
      }
    });
    byId("ranking").replaceChildren(...nodes);
  };

  /* Choosing. */

  const refresh = () => { paint(); rank(); describe(state.pinned >= 0 ? state.pinned : state.cursor); };
  const unitsAt = (index) => data.pieces[index].map((units, k) => (state.on[k] ? units : []));
  const inSight = (index) => branches[index] < 0 || branches[index] === branchOf(front(), state.row[front()]);
  const reachable = (index) => inSight(index) && (spans[index].dataset.t !== undefined || unitsAt(index).some((units) => units.length));
  // All spans of the unit at one of them.
  const together = (index) => {
    const unit = overlay ? undefined : unitsAt(index)[front()][0];
    return unit === undefined ? [index] : places[front()].get(unit);
  };
  const check = (name, value) => {
    const radio = document.querySelector(`input[name="${name}"][value="${value}"]`);
    if (radio) radio.checked = true;
  };
  const choose = (k, row) => {
    // What is by other units is about the same targets.
    for (const each of overlay ? [k] : all.keys()) {
      state.row[each] = row;
      state.shown[each] = FIRST;
    }
    if (!overlay) {
      const chosen = new Set(row > 0 ? tokensOf(0, row).map((t) => String(t - 1)) : []);
      for (const span of spans) span.classList.toggle("sel", chosen.has(span.dataset.t));
      check("target", row);
    }
    if (several) {
      const branch = branchOf(k, row);
      for (const node of text.querySelectorAll("[data-b]")) node.hidden = Number(node.dataset.b) !== branch;
      for (const node of document.querySelectorAll("[data-of]")) node.hidden = Number(node.dataset.of) !== branch;
      check("branch", branch < 0 ? 0 : -1 - branch);
      check("target" + branch, row);
      if (state.pinned >= 0 && !inSight(state.pinned)) state.pinned = -1;
      if (state.cursor >= 0 && !inSight(state.cursor)) move(-1);
    }
    refresh();
  };
  const turn = (level) => {
    state.on = all.map((_, k) => k === level);
    state.pinned = -1;
    move(-1);
    refresh();
  };
  const move = (index) => {
    for (const span of text.querySelectorAll(".cur")) span.classList.remove("cur");
    state.cursor = index;
    if (index >= 0) {
      for (const i of together(index)) spans[i].classList.add("cur");
      spans[index].scrollIntoView({ block: "nearest" });
    }
    describe(index);
  };
  const pin = (index) => { state.pinned = index; move(index); };
  const pick = (index) => {
    if (index < 0) return;
    const target = spans[index].dataset.t;
    if (target !== undefined && !overlay && state.row[0] !== Number(target) + 1) choose(0, Number(target) + 1);
    pin(index);
  };
  const indexOf = (node) => {
    const span = node.closest ? node.closest("[data-p]") : null;
    return span ? Number(span.dataset.p) : -1;
  };
  const byRank = (step) => {
    // The ranking of the first explanation in sight.
    const k = state.on.indexOf(true);
    if (k < 0) return;
    const { order, rank: ranks } = view(k);
    if (!order.length) return;
    const here = state.cursor < 0 ? [] : data.pieces[state.cursor][k].filter((unit) => ranks.has(unit));
    const at = here.length ? ranks.get(here[0]) - 1 : -step;
    move(places[k].get(order[Math.max(0, Math.min(order.length - 1, at + step))])[0]);
  };

  text.addEventListener("mouseover", (event) => { if (state.pinned < 0) { const i = indexOf(event.target); if (i >= 0) describe(i); } });
  text.addEventListener("mouseleave", () => { if (state.pinned < 0) describe(state.cursor); });
  text.addEventListener("click", (event) => {
    const index = indexOf(event.target);
    if (index < 0) pin(-1); else pick(index);
  });
  text.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const last = spans.length - 1;
    // The first other unit from ``from`` on, else where the cursor is.
    const go = (from, step) => {
      const here = state.cursor >= 0 && state.cursor !== from ? together(state.cursor) : [];
      let index = from;
      while (index >= 0 && index <= last && (!reachable(index) || here.includes(index))) index += step;
      if (index >= 0 && index <= last) move(index);
    };
    const actions = {
      ArrowRight: () => go(Math.min(last, state.cursor + 1), 1),
      ArrowLeft: () => go(Math.max(0, state.cursor - 1), -1),
      ArrowDown: () => byRank(1),
      ArrowUp: () => byRank(-1),
      Home: () => go(0, 1),
      End: () => go(last, -1),
      Enter: () => pick(state.cursor),
      " ": () => pick(state.cursor),
      Escape: () => pin(-1),
    };
    if (!actions[event.key] || last < 0) return;
    event.preventDefault();
    if (!["Enter", " "].includes(event.key)) state.pinned = -1;
    actions[event.key]();
  });
  for (const radio of document.querySelectorAll('input[type="radio"]')) {
    const change = radio.name === "level" ? turn : (row) => choose(0, row);
    radio.addEventListener("change", () => change(Number(radio.value)));
  }
  const tools = byId("tools");
  if (tools) {
    const chips = [...document.querySelectorAll('input[name="branch"]')].map((input) => input.parentNode);
    const words = chips.map((chip) => chip.textContent.toLowerCase());
    const filter = () => {
      const wanted = byId("filter").value.trim().toLowerCase();
      let found = 0;
      chips.forEach((chip, i) => {
        chip.hidden = i > 0 && !words[i].includes(wanted);
        if (i > 0 && !chip.hidden) found += 1;
      });
      byId("found").textContent = wanted ? `${found} found` : "";
    };
    const { base, branch } = all[0];
    const likely = chips.map(() => 0); // log p; that of "all" stays 0 and comes first
    branch.forEach((b, t) => { likely[b + 1] += base[t]; });
    const sort = () => {
      const order = [...chips.keys()];
      if (byId("order").value === "likely") order.sort((a, b) => likely[b] - likely[a] || a - b);
      chips[0].parentNode.append(...order.map((i) => chips[i]));
    };
    byId("filter").addEventListener("input", filter);
    byId("order").addEventListener("change", sort);
    tools.hidden = false;
  }
  for (const box of document.querySelectorAll("input[data-k]")) {
    box.addEventListener("change", () => { state.on[Number(box.dataset.k)] = box.checked; refresh(); });
  }
  for (const select of document.querySelectorAll("select[data-k]")) {
    select.addEventListener("change", () => choose(Number(select.dataset.k), Number(select.value)));
  }

  const see = byId("see");
  if (see) {
    for (const box of see.querySelectorAll("input")) {
      box.addEventListener("change", () => text.classList.toggle(box.id, box.checked));
    }
    see.hidden = false;
  }

  const theme = byId("theme");
  const themes = ["auto", "light", "dark"];
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const next = themes[(themes.indexOf(document.documentElement.dataset.theme || "auto") + 1) % themes.length];
    document.documentElement.dataset.theme = next;
    theme.textContent = "Theme: " + next;
  });

  refresh();
})();
