// The steering panel. `props.catalogue` is what may be chosen, `props.value` what is chosen: the
// fields of RunSettings that steer. Python sets both; here only the value changes. Every change is
// reported by `submit`, a slider's once it is let go. Text goes in by textContent alone.
const root = element.querySelector(".tt-panel");
const make = (tag, fields = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(fields)) {
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter(Boolean));
  return made;
};
const chosen = () => props.value || {};
// Redrawing takes the focus away from what was used; it gets it back by its key.
const set = (changes, { redraw = true, tell = true } = {}) => {
  props.value = { ...chosen(), ...changes };
  if (redraw) draw();
  if (tell) trigger("submit");
};
const MANY = 8; // beyond it a list is chosen from
const FOLDED = 3; // beyond it classifiers that do nothing are folded
const unfolded = new Set();
const label = (text) => text.replaceAll("_", " ");
const offered = () => props.catalogue;

const zoneBar = (zones, reach) =>
  make("div", { class: "tt-zones", "aria-hidden": "true" },
    ...zones.map((zone) => {
      const bar = make("i", { class: `tt-zone-${zone.level}`, title: zone.level });
      bar.style.width = `${((zone.end - zone.start) / (2 * reach)) * 100}%`;
      return bar;
    }),
    make("b", { class: "tt-unit", style: `left:${((reach + 1) / (2 * reach)) * 100}%`, title: "1.0: the calibrated unit" }),
    make("b", { class: "tt-zero", style: "left:50%" }));

const zoneAt = (zones, scale) =>
  (zones.find((zone) => scale >= zone.start && scale <= zone.end) || { level: "unmeasured" }).level;

const slider = ({ key, name, value, low, high, zones, move, bar }) => {
  const shown = make("output", { class: "tt-value" });
  const say = (scale) => {
    const level = zones ? zoneAt(zones, scale) : "";
    shown.textContent = `${scale > 0 ? "+" : ""}${scale.toFixed(2)}`;
    shown.dataset.level = level;
    range.setAttribute("aria-valuetext", `${scale.toFixed(2)}${level ? ", " + level : ""}`);
  };
  const range = make("input", {
    type: "range", min: low, max: high, step: 0.05, value, "aria-label": name, "data-key": key,
    oninput: () => { say(+range.value); move(+range.value, false); },
    onchange: () => move(+range.value, true),
    ondblclick: () => { range.value = 0; say(0); move(0, true); },
  });
  say(+value);
  return make("div", { class: "tt-slider" }, make("div", { class: "tt-track" }, range, bar), shown);
};

const picker = (key, name, options, pick) =>
  make("select", {
    "aria-label": name, "data-key": key,
    onchange: (event) => { if (event.target.value) pick(event.target.value); },
  }, make("option", { value: "", text: name }), ...options.map((id) => make("option", { value: id, text: id })));

const section = (title, hint, ...children) =>
  make("fieldset", {}, make("legend", { text: title }), hint && make("p", { class: "tt-hint", text: hint }), ...children);

function vectors() {
  const { vectors: all, reach } = offered();
  const stored = (term) => all.find((one) => one.id === term.id);
  const rows = (chosen().vectors || []).filter(stored).map((term) => {
    const card = stored(term);
    const replace = (scale, tell) => set(
      { vectors: chosen().vectors.map((one) => (one.id === term.id ? { ...one, scale } : one)) },
      { redraw: false, tell });
    return make("div", { class: "tt-row", title: card.about },
      make("div", { class: "tt-name" }, make("span", { text: term.id }),
        make("button", {
          type: "button", class: "tt-remove", "aria-label": `Remove ${term.id}`, text: "×", "data-key": `remove-${term.id}`,
          onclick: () => set({ vectors: chosen().vectors.filter((one) => one.id !== term.id) }),
        })),
      slider({
        key: `vector-${term.id}`, name: `Scale of ${term.id}`, value: term.scale, low: -reach, high: reach,
        zones: card.zones, move: replace, bar: zoneBar(card.zones, reach),
      }));
  });
  const free = all.map((one) => one.id).filter((id) => !(chosen().vectors || []).some((one) => one.id === id));
  const add = (id) => set({ vectors: [...(chosen().vectors || []), { id, scale: 1 }] });
  const key = rows.length && make("p", { class: "tt-key" },
    ...["fluent", "strained", "broken", "unmeasured"].map((level) =>
      make("span", {}, make("i", { class: `tt-zone-${level}` }), level)));
  return section("Vectors", all.length ? null : "None is stored yet: make one under Build.",
    ...rows, key || null,
    free.length && rows.length < 8 ? picker("add-vector", "Add a vector…", free, add) : null);
}

// A short list is shown whole; of a long one what is on, and a picker for the rest.
function toggles(title, hint, key, ids, current, change) {
  if (!ids.length) return null;
  const isOn = (id) => current.includes(id);
  const [shown, free] = ids.length > MANY ? [ids.filter(isOn), ids.filter((id) => !isOn(id))] : [ids, []];
  return section(title, hint,
    make("div", { class: "tt-chips" }, ...shown.map((id) => {
      return make("button", {
        type: "button", class: "tt-chip", "aria-pressed": isOn(id), "data-key": `${key}-${id}`, text: id,
        onclick: () => change(isOn(id) ? current.filter((one) => one !== id) : [...current, id]),
      });
    })),
    free.length ? picker(`add-${key}`, `${title}…`, free, (id) => change([...current, id])) : null);
}

function classifiers() {
  return offered().classifiers.map((card) => {
    const empty = { classifier: card.id, target: [], avoid: [], scale: 1 };
    const all = chosen().guidance || [];
    const term = { ...empty, ...all.find((one) => one.classifier === card.id) };
    const put = (changes, options) => {
      const next = { ...empty, ...(chosen().guidance || []).find((one) => one.classifier === card.id), ...changes };
      const others = (chosen().guidance || []).filter((one) => one.classifier !== card.id);
      set({ guidance: next.target.length + next.avoid.length ? [...others, next] : others }, options);
    };
    const chips = card.labels.map((name) => {
      const way = term.target.includes(name) ? "toward" : term.avoid.includes(name) ? "away" : "off";
      const turn = () => {
        const without = { target: term.target.filter((x) => x !== name), avoid: term.avoid.filter((x) => x !== name) };
        if (way === "off") put({ ...without, target: [...without.target, name] });
        else if (way === "toward") put({ ...without, avoid: [...without.avoid, name] });
        else put(without);
      };
      const sign = { toward: "+ ", away: "− ", off: "" }[way];
      return make("button", {
        type: "button", class: `tt-chip tt-${way}`, "data-key": `label-${card.id}-${name}`, onclick: turn,
        "aria-label": `${label(name)}: ${way}. Press for ${{ off: "toward", toward: "away", away: "off" }[way]}`,
        text: sign + label(name),
      });
    });
    const zones = [
      { start: 0, end: 1, level: "fluent" }, { start: 1, end: 1.5, level: "strained" },
      { start: 1.5, end: 2, level: "broken" },
    ];
    const bar = zoneBar(zones, 1);
    bar.querySelector(".tt-unit").style.left = "50%";
    bar.querySelector(".tt-zero").remove();
    const isUsed = term.target.length + term.avoid.length;
    const title = `Classifier: ${card.id}`;
    const labels = make("div", { class: "tt-chips", title: card.about }, ...chips);
    if (!isUsed && offered().classifiers.length > FOLDED) {
      return make("details", {
        open: unfolded.has(card.id) ? "" : null,
        ontoggle: (event) => unfolded[event.target.open ? "add" : "delete"](card.id),
      }, make("summary", { text: title, "data-key": `fold-${card.id}` }), labels);
    }
    return section(title, "Press a label for toward (+), again for away (−).", labels,
      isUsed ? slider({
        key: `guidance-${card.id}`, name: `Dose of ${card.id}, in calibrated doses`, value: term.scale,
        low: 0, high: 2, zones, bar, move: (scale, tell) => put({ scale }, { redraw: false, tell }),
      }) : null);
  });
}

function gate() {
  const when = chosen().when;
  const probes = [...new Set([...offered().probes, ...(when ? [when.probe] : [])])];
  if (!probes.length) return null;
  const way = when && when.below !== undefined && when.below !== null ? "below" : "above";
  const share = when ? when[way] : 0.5;
  const layer = when && Number.isInteger(when.layer) ? when.layer : null;
  const put = (probe, direction, at, where = layer) =>
    set({ when: { probe, [direction]: at, ...(where === null ? {} : { layer: where }) } });
  return section("Gate", when ? null : "Steer only where a probe reads it in the hidden state.",
    make("div", { class: "tt-gate" },
      make("select", {
        "aria-label": "Gate's probe", "data-key": "gate-probe",
        onchange: (event) => event.target.value ? put(event.target.value, way, share, null) : set({ when: null }),
      }, make("option", { value: "", text: "no gate" }),
      ...probes.map((id) => {
        const option = make("option", { value: id, text: id });
        option.selected = !!when && when.probe === id;
        return option;
      })),
      when && make("select", {
        "aria-label": "Gate opens above or below", "data-key": "gate-way",
        onchange: (event) => put(when.probe, event.target.value, share),
      }, ...["above", "below"].map((name) => {
        const option = make("option", { value: name, text: name });
        option.selected = name === way;
        return option;
      })),
      when && make("input", {
        type: "number", min: 0, max: 1, step: 0.05, value: share, "aria-label": "Gate's threshold",
        "data-key": "gate-share",
        onchange: (event) => put(when.probe, way, Math.min(1, Math.max(0, +event.target.value || 0))),
      }),
      when && make("input", {
        type: "number", min: 0, step: 1, value: layer, "aria-label": "Layer the gate reads; empty: the probe's own",
        placeholder: "layer", title: "Layer the gate reads, at or before the first it gates; empty: the probe's own",
        "data-key": "gate-layer",
        onchange: (event) => put(when.probe, way, share, event.target.value === "" ? null : Math.trunc(+event.target.value)),
      })));
}

function preset() {
  const presets = [...new Set([...offered().presets, ...(chosen().preset ? [chosen().preset] : [])])];
  if (!presets.length) return null;
  const select = picker("preset", "no preset", presets, (id) => set({ preset: id }));
  select.addEventListener("change", (event) => { if (!event.target.value) set({ preset: null }); });
  select.value = chosen().preset || "";
  return section("Preset", "Applied before what is chosen here.", select);
}

// What is chosen and not stored, by a link or because somebody deleted it: the server refuses every
// answer until it is taken out.
function missing() {
  const { vectors: all, classifiers: known, probes, presets } = offered();
  const now = chosen();
  const names = [...all, ...known].map((one) => one.id);
  const isKnown = (name) => names.includes(name) || probes.includes(name);
  const labelsOf = (id) => (known.find((one) => one.id === id) || { labels: [] }).labels;
  const found = [];
  const add = (about, changes) => found.push({ about, changes });
  const each = (field, name, isStored) => (now[field] || []).filter((one) => !isStored(one)).forEach((gone) =>
    add(name(gone), () => ({ [field]: chosen()[field].filter((one) => one !== gone) })));
  if (now.preset && !presets.includes(now.preset)) add(`preset ${now.preset}`, () => ({ preset: null }));
  each("vectors", (one) => `vector ${one.id}`, (one) => all.some((card) => card.id === one.id));
  each("guidance", (one) => `classifier ${one.classifier}: ${[...one.target, ...one.avoid].join(", ")}`,
    (one) => [...one.target, ...one.avoid].every((name) => labelsOf(one.classifier).includes(name)));
  each("ablate", (id) => `ablated ${id}`, (id) => all.some((card) => card.id === id));
  if (now.when && !isKnown(now.when.probe)) add(`gate on ${now.when.probe}`, () => ({ when: null }));
  each("probes", (id) => `reading of ${id}`, isKnown);
  if (!found.length) return null;
  return section("Not on this server", "No answer is steered until this is taken out.",
    make("div", { class: "tt-chips" }, ...found.map(({ about, changes }) =>
      make("button", {
        type: "button", class: "tt-chip tt-missing", "data-key": `missing-${about}`, "aria-label": `Take out ${about}`,
        text: `${about} ×`, onclick: () => set(changes()),
      }))));
}

function draw() {
  if (!offered()) {
    root.replaceChildren(make("p", { class: "tt-hint", text: "Nothing to steer with yet." }));
    return;
  }
  const focused = root.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  const { vectors: all, probes, classifiers: known } = offered();
  const names = all.map((one) => one.id);
  const readers = [...known.map((one) => one.id), ...probes.filter((id) => !id.includes("/"))];
  root.replaceChildren(...[
    missing(), vectors(), ...classifiers(),
    toggles("Ablate", "Remove a direction wherever it shows.", "ablate", names, chosen().ablate || [],
      (ablate) => set({ ablate })),
    gate(), preset(),
    toggles("Read", "Probes that colour the tokens; they change nothing.", "probe", readers,
      chosen().probes || [], (list) => set({ probes: list.slice(-8) })),
  ].filter(Boolean));
  // What was used may be gone, as a removed vector is.
  if (focused) (root.querySelector(`[data-key="${CSS.escape(focused)}"]`) || root.querySelector("[data-key]"))?.focus();
}

watch(["catalogue", "value"], draw);
draw();
