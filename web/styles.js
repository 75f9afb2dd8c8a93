// The style sheets of a recorded page, as the visitor's browser read them: its
// media features are not those of whoever watches, and nobody hovers here. The
// rules are rewritten in the rebuilt sheets, so that it does not matter in which
// way a sheet came: with the page, later, by insertRule, by adoption.

// What the recorded page's elements are is in attributes (see picture.js).
const OWN = /(?<!\\):(hover|focus-within)(?![\w-])/g;
const STATES = /(?<!\\):(focus-visible|focus|fullscreen|target|invalid|user-invalid|user-valid)(?![\w-])/g;
const VALID = /(?<!\\):valid(?![\w-])/g; // stars are no address: what is not noted as invalid is valid
const CHECKED = ':where(form, fieldset, input, select, textarea):where(:not(:disabled, [readonly]))';
const DEFINED = /(?<!\\):defined(?![\w-])/g;
const FEATURES = 'prefers-[a-z-]+|forced-colors|inverted-colors|(?:any-)?(?:hover|pointer)';
const MEDIA = new RegExp(`\\(\\s*(${FEATURES})\\s*(?::\\s*([a-z-]+)\\s*)?\\)`, 'gi');
const BOTH_SCHEMES = /\b(?:light\s+dark|dark\s+light)\b/;

export class Styles {
  constructor() {
    this.features = []; // of the visitor: ["hover:none", …]; empty: not recorded
    // What is rewritten → {original, written}; held, or the browser makes the rules' objects anew.
    this.originals = new Map();
    this.owners = new Set(); // elements and constructed sheets that may have to be rewritten again
  }

  // setMedia takes replay-media.
  setMedia(text) {
    this.features = text.toLowerCase().split(' ');
    for (const owner of this.owners) this.rewrite(owner);
  }

  // rewrite takes a constructed sheet, or an element: then it rewrites the style sheet
  // of that, or what else in it asks for media features.
  rewrite(owner) {
    const sheet = owner.cssRules ? owner : owner.sheet;
    if (sheet) this.replace(sheet.media, 'mediaText');
    if (sheet) this.rewriteRules(sheet.cssRules);
    else if (owner.nodeName === 'SOURCE') this.replace(owner, 'media');
    else if (owner.nodeName === 'META' && owner.name === 'color-scheme') this.replace(owner, 'content');
    else if (owner.style?.colorScheme) this.replace(owner.style, 'colorScheme');
    else return;
    this.owners.add(owner);
  }

  rewriteRules(rules) {
    for (const rule of rules) {
      if (rule.selectorText?.includes(':')) this.rewriteSelector(rule);
      if (rule.media) this.replace(rule.media, 'mediaText');
      if (rule.style?.colorScheme) this.replace(rule.style, 'colorScheme');
      if (rule.cssRules?.length) this.rewriteRules(rule.cssRules);
    }
  }

  rewriteSelector(rule) {
    const selector = rule.selectorText;
    const own = selector.replace(OWN, '[replay-$1]').replace(STATES, '[replay-state~="$1"]')
      .replace(VALID, `${CHECKED}:not([replay-state~="invalid"])`)
      .replace(DEFINED, ':not([replay-state~="undefined"])');
    if (own !== selector) rule.selectorText = own;
  }

  // replace rewrites a property, from its original each time.
  replace(object, property) {
    const known = this.originals.get(object);
    const original = known?.written === object[property] ? known.original : object[property];
    const written = this.asVisited(original);
    if (written === object[property]) return;
    object[property] = written;
    this.originals.set(object, { original, written: object[property] });
  }

  // asVisited answers media queries as the visitor's browser would have. Where a page
  // leaves its color scheme to the browser, the visitor's is taken.
  asVisited(text) {
    const scheme = this.features.find((f) => f.startsWith('prefers-color-scheme:'))?.split(':')[1];
    const decided = text.replace(MEDIA, (all, name, value) => {
      const feature = `${name.toLowerCase()}:`, first = this.features.find((f) => f.startsWith(feature));
      if (!first) return all; // the visitor's browser did not know it
      const isWanted = value && this.features.includes(feature + value.toLowerCase());
      const holds = value ? isWanted : !/:no(ne|-preference)$/.test(first);
      return holds ? '(min-width: 0)' : '(max-width: 0)';
    });
    return scheme ? decided.replace(BOTH_SCHEMES, scheme) : decided;
  }
}
