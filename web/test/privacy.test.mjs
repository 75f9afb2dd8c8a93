// What is private stays in the page: everything that can hold a secret is given
// one, and all that the server stored and logged is searched for it.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { until } from "./harness.mjs";
import { arrived, close, customs, embed, established, everything, h, mark, movable, open, pages, playable, sessionOf, site, visit } from "./recorded.mjs";

before(() => open({ LOG_LEVEL: "debug" }));
after(close);

const file = (name) => readFileSync(new URL(`pages/${name}`, import.meta.url), "utf8");

// assertNowhere looks for five letters in a row of each secret.
function assertNowhere(text, secrets) {
  text = text.toLowerCase();
  for (const [what, secret] of Object.entries(secrets)) {
    for (let i = 0; i + 5 <= secret.length; i++) {
      const at = text.indexOf(secret.slice(i, i + 5).toLowerCase());
      assert.ok(at < 0, `${what} is stored: …${text.slice(Math.max(0, at - 300), at + 50)}`);
    }
  }
}

const secrets = {
  typed: "SECRETtyped", password: "SECRETpassword", shown: "SECRETshown", area: "SECRETarea", note: "SECRETnote",
  hidden: "SECREThidden", set: "SECRETset", cleared: "SECRETcleared", areaDefault: "SECRETareadefault", radio: "SECRETradio",
  custom: "SECRETcustom", shadow: "SECRETshadow", masked: "SECRETmasked", title: "SECRETtitle", blocked: "SECRETblocked",
  query: "SECRETquery", fragment: "SECRETfragment", link: "SECRETlink", action: "SECRETaction", style: "SECRETstyle",
  meta: "SECRETmeta", handler: "SECREThandler", script: "SECRETscript", comment: "SECRETcomment", srcdoc: "SECRETsrcdoc",
  noscript: "SECRETnoscript", data: "SECRETdata", design: "SECRETdesign", spa: "SECRETspa", own: "SECRETown", late: "SECRETlate",
  optionally: "SECRETselector", pasted: "SECRETpasted", ignored: "SECRETignored", slider: "SECRETslider", referrer: "SECRETreferrer",
  picture: "SECRETpicture", relative: "SECRETrelative", stack: "SECRETstack", framed: "SECRETframed", hiddenlate: "SECRETlatehidden",
};

const privatePage = (s) => `
  <meta name="csrf" content="${s.meta}">
  <p>What everybody may see</p>
  <input id=typed><input id=password type=password><input id=shown type=password><textarea id=area></textarea>
  <input type=hidden id=hidden value="${s.hidden}" data-copy="${s.data}"><input id=set><input id=cleared value="${s.cleared}">
  <textarea id=areadefault>${s.areaDefault}</textarea>
  <label><input type=radio name=r id=radio value="${s.radio}"> one</label><input type=checkbox id=check value="${s.radio}">
  <input type=submit value="Send it"><input type=reset value="Start again">
  <div id=note contenteditable><span contenteditable=false>${s.note}</span></div>
  <div data-replay-mask title="${s.title}">${s.masked}<i aria-label="${s.title}"></i><div id=maskedhost></div></div>
  <div class=own>${s.optionally}</div>
  <div data-replay-block title=${s.blocked}>${s.blocked}<b id=inblock class=${s.blocked}></b><div id=blockedhost></div></div>
  <div data-replay-block id=blockedself></div><div id=blockedlater><i>open so far</i></div>
  <input data-replay-ignore id=ignored>
  <custom-field id=custom></custom-field>
  <div id=slider role=slider aria-valuetext="${s.slider}"></div>
  <a href="/x?token=${s.link}">link</a> <a href="#top">top</a> <a href="/x#access_token=${s.fragment}">fragment</a>
  <a data-href="x?a=${s.relative}">relative</a>
  <form action="/go?token=${s.action}"></form>
  <img src="/picture?sig=${s.picture}"><div style="background: url(/b?sig=${s.style})" onclick="go('${s.handler}')"></div>
  <style>p { background: url("/c?sig=${s.style}") }</style>
  <script type="application/json">{"a": "${s.script}"}</script><!-- ${s.comment} -->
  <noscript>${s.noscript}</noscript>
  <iframe id=frame srcdoc="<input value='${s.srcdoc}'><div contenteditable>${s.srcdoc}</div>"></iframe>
  <iframe id=design></iframe>
  <div data-replay-mask><iframe id=framed srcdoc="<p>${s.framed}</p>"></iframe></div>`;

test("what is private never leaves the page", async (t) => {
  embed("/private", privatePage(secrets), 'data-mask-text=".own"');
  pages["/private/next"] = pages["/private"];
  pages["/from"] = `<a href="/private?token=${secrets.query}#access_token=${secrets.fragment}">go</a>`;
  const page = await visit(t, `${site}/from?token=${secrets.referrer}`);
  await page.click("a");
  const id = await sessionOf(page);
  await page.locator("#typed").pressSequentially(secrets.typed);
  await page.locator("#password").pressSequentially(secrets.password);
  await page.locator("#shown").pressSequentially(secrets.shown);
  await page.locator("#area").pressSequentially(secrets.area);
  await page.locator("#ignored").pressSequentially(secrets.ignored);
  await page.click("#note");
  await page.keyboard.type(secrets.note);
  await page.fill("#cleared", "");
  await page.fill("#areadefault", "");
  await page.check("#radio");
  await page.check("#check");
  await page.evaluate((s) => {
    const $ = (id) => document.getElementById(id);
    $("shown").type = "text";
    $("set").value = s.set;
    $("set").setAttribute("value", s.set);
    $("hidden").value = s.hiddenlate;
    $("hidden").setAttribute("value", s.hiddenlate);
    $("hidden").dataset.copy = s.data;
    $("custom").setAttribute("value", s.custom);
    $("areadefault").textContent = s.areaDefault;
    $("slider").setAttribute("aria-valuetext", `${s.slider}2`);
    for (const id of ["custom", "maskedhost", "blockedhost"]) $(id).attachShadow({ mode: "open" });
    $("custom").shadowRoot.innerHTML = `<input value="${s.shadow}">`;
    $("maskedhost").shadowRoot.append(s.masked);
    $("blockedhost").shadowRoot.innerHTML = `<p>${s.blocked}</p>`;
    $("blockedself").attachShadow({ mode: "open" }).innerHTML = `<p class=${s.blocked}>${s.blocked}</p>`;
    $("blockedlater").dataset.replayBlock = "";
    const late = document.createElement("div");
    late.innerHTML = `<textarea>${s.late}</textarea><input type=hidden value="${s.late}"><p data-replay-mask>${s.late}</p>
      <div data-replay-block><p title=${s.late}>${s.late}</p></div><a href="?x=${s.late}" title="x">late</a><b contenteditable>${s.late}</b>`;
    document.body.append(late);
    $("note").append(Object.assign(document.createElement("img"), { src: `data:image/png;base64,${s.pasted}`, alt: s.pasted }));
    $("note").append(Object.assign(document.createElement("a"), { href: `https://links.test/${s.pasted}`, textContent: s.pasted }));
    const design = $("design").contentDocument;
    design.designMode = "on";
    design.body.textContent = s.design;
    history.pushState(null, "", `/private/next?step=${s.spa}`);
    setTimeout(() => {
      $("maskedhost").shadowRoot.firstChild.data = `${s.masked}2`;
      $("blockedhost").shadowRoot.firstChild.textContent = `${s.blocked}2`;
      $("inblock").textContent = s.blocked;
      $("blockedlater").firstChild.className = $("blockedlater").firstChild.textContent = s.blocked;
      late.querySelector("textarea").textContent = `${s.late}2`;
      design.body.firstChild.data += "2";
      document.querySelector(".own").firstChild.data += "2";
      document.querySelector("[data-replay-mask]").title += "2";
      document.querySelector("img").src += "&again=1";
      $("slider").style.backgroundImage = `url("/d?sig=${s.style}")`;
      document.styleSheets[0].insertRule(`i { background: url(d?sig=${s.style}) }`);
    }, 100);
    setTimeout(() => { window.changed = true; throw new Error(`see ${location.origin}/x?token=${s.stack}`); }, 150);
  }, secrets);
  await until(() => page.evaluate(() => window.changed), "the changes");
  await page.reload(); // the browser restores what was typed into the fields
  await page.evaluate(() => history.replaceState(null, "", "/private"));
  await mark(page, 1);
  const events = await arrived(page, id);
  await until(async () => (await h.sql("select 1 from session_errors")).length, "the error");

  const stored = await everything();
  for (const [what, secret] of Object.entries(secrets)) assert.ok(!stored.includes(secret), `${what} is stored: …${stored.slice(Math.max(0, stored.indexOf(secret) - 300), stored.indexOf(secret) + 50)}`);
  assert.ok(!stored.includes("SECRET"), `…${stored.slice(Math.max(0, stored.indexOf("SECRET") - 300), stored.indexOf("SECRET") + 50)}`);
  for (const shown of ["What everybody may see", "Send it", "Start again", '"navigation"', "custom-field"]) assert.ok(stored.includes(shown), shown);
  const inputs = events.filter((e) => e.type === 3 && e.data.source === 5).map((e) => e.data.text);
  assert.ok(inputs.includes("*".repeat(secrets.typed.length)), "typing is seen, as stars");
  assert.ok(inputs.includes("********") && !inputs.includes("*".repeat(secrets.password.length)), "of a password not even the length");
  assert.match(await playable(events), /What everybody may see/);
});

// secretFor gives ten letters and digits that stand nowhere by chance.
const secretFor = () => Array.from({ length: 10 }, (_, i) => (i % 3 === 2 ? "23456789" : "gjkqvwxyz")[Math.floor(Math.random() * 8)]).join("");

test("what is typed comes up nowhere, wherever the page repeats it", async (t) => {
  embed("/echo", file("echo.html"));
  const page = await visit(t, `${site}/echo`, { script: movable });
  const id = await established(page);
  const typed = {};
  for (const field of await page.locator(".typed").all()) {
    const name = await field.evaluate((el) => el.name || el.dataset.name);
    typed[name] = secretFor();
    if (name === "encoded" || name === "route") typed[name] = `${secretFor()} & ${secretFor()}`;
    if (name === "inplace") typed[name] = `to be ${secretFor()}`;
    await (name === "inplace" ? field.dblclick({ position: { x: 5, y: 5 } }) : field.click());
    await page.keyboard.type(name === "email" ? `${typed[name]}@example.com` : typed[name]);
    if (name === "deleted") for (let i = 0; i < 12; i++) await page.keyboard.press("Backspace");
  }
  for (const name of ["frame", "pasted", "file", "filled", "hidden"]) typed[name] = secretFor();
  await page.frameLocator("iframe").locator("input").click();
  await page.keyboard.type(typed.frame);
  await page.setInputFiles("#file", { name: `${typed.file}.pdf`, mimeType: "application/pdf", buffer: Buffer.from("x") });
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
  await page.evaluate((text) => navigator.clipboard.writeText(text), typed.pasted);
  await page.click("#pasted");
  await page.keyboard.press("Control+V");
  await page.evaluate(({ filled, hidden }) => {
    const $ = (id) => document.getElementById(id);
    $("filled").value = filled;
    $("hidden").setAttribute("value", hidden);
    setTimeout(() => { $("fromscript").textContent = filled; $("fromhidden").textContent = hidden; }, 50);
  }, typed);
  await until(() => page.evaluate(() => document.getElementById("fromhidden").textContent), "the script");
  assert.equal(await page.locator("#frompaste").textContent(), typed.pasted);
  await page.evaluate(() => { window.move(6 * 60_000); document.body.append("after six minutes"); }); // a snapshot is due
  await until(async () => (await h.events(id)).filter((e) => e.type === 2).length === 2, "a second snapshot");
  await mark(page, 1);
  const events = await arrived(page, id);
  await until(async () => (await h.json(`/sessions/${id}`)).errorCount >= 20, "the errors");
  await until(async () => (await h.json(`/sessions/${id}`)).metadata.lastUrl?.includes("*"), "the session's last page");

  const stored = await everything() + h.log();
  assertNowhere(stored, { ...typed, inplace: typed.inplace.slice(6) });
  for (const shown of ["What everybody may see", "of the latest model", "Nothing was found for", "Your address: ", "no such thing: ", "Search words", "Untitled"]) {
    assert.ok(stored.includes(shown), `${shown} is not stored`);
  }
  assert.match(await playable(events), /What everybody may see/);
  assert.ok(!JSON.stringify(events.findLast((e) => e.type === 2)).includes("beside it"), "what was edited is masked whole");
});

test("what a page draws of keys as they come, letter by letter, is masked", async (t) => {
  const page = await visit(t, embed("/drawn", `<div id=pad tabindex=0></div><p id=p></p><script>
    const pad = document.getElementById("pad"); // an editor of the page's own: to the browser it is none
    pad.onkeydown = ({ key }) => { pad.append(Object.assign(document.createElement("b"), { textContent: key })); };
  </script>`));
  const id = await established(page);
  await page.focus("#pad");
  await page.keyboard.type("qxj7wvzk");
  await page.evaluate(() => { document.getElementById("p").textContent = "saved"; });
  await mark(page, 1);
  const drawn = (await arrived(page, id)).slice(2).flatMap(({ data }) => data.adds || []).map(({ node }) => node.textContent).filter(Boolean);
  assert.deepEqual(drawn, [..."********", "saved"]);
});

test("what is typed is known in other forms, and from places that are not recorded", async (t) => {
  const page = await visit(t, embed("/forms", `<textarea id=t></textarea><a id=a download>Save</a><p id=p></p>
    <input id=pw type=password data-replay-show><div data-replay-block><iframe id=f srcdoc="<input>"></iframe></div><p id=q></p>
    <div style='background:url("/img (1).png?sig=SECRETsigned")'>What everybody may see</div><p>see https://x.test/O'Brien.pdf?sig=SECRETlinked</p>
    <p data-replay-mask><time datetime="SECRETday">then</time></p><ul id=pad tabindex=0><li>1<li>2<li>3<li>4</ul><script>
    const $ = (id) => document.getElementById(id);
    $("t").oninput = () => { $("a").href = "data:text/plain," + encodeURIComponent($("t").value); };
    $("t").onchange = () => { $("p").textContent = $("t").value + "!"; };
    $("pad").onkeydown = ({ key }) => { $("pad").append(key); };
    $("f").onload = () => { $("f").contentDocument.querySelector("input").oninput = (e) => { $("q").textContent = e.target.value; }; };
  </script>`), { script: movable });
  const id = await established(page);
  const typed = { blanks: "qzkw\u3000vjxq", password: secretFor(), blocked: secretFor() };
  await page.click("#t");
  await page.keyboard.type(typed.blanks);
  await page.click("#pw");
  await page.keyboard.type(typed.password);
  await page.evaluate(() => { document.getElementById("pw").type = "text"; });
  await page.frameLocator("#f").locator("input").click();
  await page.keyboard.type(typed.blocked);
  assert.equal(await page.locator("#q").textContent(), typed.blocked);
  await page.focus("#pad");
  await page.keyboard.type("7w8z");
  await page.evaluate(() => { window.move(6 * 60_000); document.body.append("after six minutes"); }); // a snapshot is due
  await until(async () => (await h.events(id)).filter((e) => e.type === 2).length === 2, "a second snapshot");
  await mark(page, 1);
  const events = await arrived(page, id), stored = await everything() + h.log();
  assertNowhere(stored, { ...typed, blanks: "qzkw", behind: "vjxq\u3000" });
  for (const secret of ["qzkw", "vjxq", "SECRET"]) assert.equal(stored.split(secret)[1]?.slice(0, 99), undefined, secret + stored.split(secret)[0].slice(-200));
  assert.ok(stored.includes("What everybody may see") && stored.includes("after six minutes"));
  assert.doesNotMatch(JSON.stringify(events.findLast((e) => e.type === 2)), /"textContent":"[78wz]"/);
});

test("a page keeps its styles when somebody types the name of a class", async (t) => {
  const page = await visit(t, embed("/card", `<style>.card { color: teal }</style><input id=q><div id=d class="card wide">a card</div><p id=p></p>`));
  const id = await established(page);
  await page.click("#q");
  await page.keyboard.type("card");
  await page.evaluate(() => {
    document.getElementById("d").className = "card narrow";
    document.getElementById("p").innerHTML = `<i class="card">cards and more</i><i class="x-card">new</i>`;
  });
  await mark(page, 1);
  const added = JSON.stringify((await arrived(page, id)).slice(2));
  for (const kept of [`"card narrow"`, `"class":"card"`, `"****s and more"`, `"x-****"`]) assert.ok(added.includes(kept), kept);
});

test("one attribute shows what is typed into a field", async (t) => {
  const page = await visit(t, embed("/shown", `<input id=words data-replay-show><p id=result></p><div id=note contenteditable data-replay-show></div>
    <input id=pin type=password data-replay-show><div data-replay-mask><input id=inside data-replay-show></div>
    <script>words.oninput = () => { result.textContent = "Results for " + words.value; };</script>`));
  const id = await established(page);
  const secrets = { pin: secretFor(), inside: secretFor() };
  for (const [field, text] of Object.entries({ words: "garden chairs", note: "an open note", ...secrets })) {
    await page.click(`#${field}`);
    await page.keyboard.type(text);
  }
  await mark(page, 1);
  const events = await arrived(page, id);
  const inputs = events.filter((e) => e.type === 3 && e.data.source === 5).map((e) => e.data.text);
  assert.ok(inputs.includes("garden chairs"), "the words are in the recording");
  const stored = JSON.stringify(events);
  for (const shown of ["Results for garden chairs", "an open note"]) assert.ok(stored.includes(shown), shown);
  assertNowhere(stored, secrets);
});

const addresses = (s) => `<a href="https://ann:${s.user}@files.example.com/x">files</a> <a href="/cart;jsessionid=${s.link};v=2/items">cart</a>
  <a href="/next#${s.fragment}">next</a> <a id=sect href="#details">details</a> <a href="#${s.own}">own</a> <a href="#/users/42/edit">route</a>
  <a href="#/reset/${s.route}">reset</a> <h2 id=details>Details</h2>
  <form action="https://ann:${s.form}@x.test/go;sid=${s.form}"></form> <iframe src="/framed;token=${s.frame}#${s.frame}"></iframe>
  <iframe src="http://framed.test/x;token=${s.foreign}?a=${s.foreign}#${s.foreign}"></iframe>
  <img srcset="/a.png?sig=${s.srcset} 1x, /b.png;x=${s.srcset} 2x"><p>see https://ann:${s.text}@x.test/a;b=${s.text}?c=${s.text}#${s.text} for more</p>
  <div data-go="/cart;jsessionid=${s.data}" style="background: url(/x;k=${s.style}?${s.style})"></div>
  <svg><use href="#shape"></use><use href="/icons.svg?v=${s.icons}#user"></use></svg>
  <style>p { background: url("/c;k=${s.css}?sig=${s.css}") }</style>`;

test("addresses carry no secrets", async (t) => {
  const names = ["user", "link", "fragment", "own", "route", "form", "frame", "foreign", "srcset", "text", "data", "style", "icons", "css",
    "session", "token", "stack", "filename", "referrer"];
  const s = Object.fromEntries(names.map((name) => [name, secretFor()]));
  embed("/addresses", addresses(s));
  pages[`/addresses;jsessionid=${s.session}`] = pages["/addresses"];
  pages["/before"] = `<a href="/addresses">go</a>`;
  const page = await visit(t, `${site}/before?from=${s.referrer}`);
  await page.click("a");
  const id = await established(page);
  await page.evaluate((s) => {
    history.pushState(null, "", `/addresses;jsessionid=${s.session}`);
    location.hash = `eyJhbGciOiJIUzI1NiJ9.${s.token}.tokensig99`;
    location.hash = "details";
    location.hash = `/orders/7/${s.token}`;
    setTimeout(() => { throw new Error(`at https://ann:${s.stack}@x.test/a.js;k=${s.stack}?v=${s.stack}#${s.stack}:12:7 it fails`); });
    window.dispatchEvent(new ErrorEvent("error", { message: "m", filename: `https://x.test/a.js?v=${s.filename}` }));
    document.querySelector("a").href = `/again;jsessionid=${s.link}#${s.fragment}`;
  }, s);
  await mark(page, 1);
  await page.goto(`${site}/addresses;jsessionid=${s.session}`);
  await mark(page, 1);
  const events = await arrived(page, id);
  await until(async () => (await h.json(`/sessions/${id}`)).errorCount === 2, "the errors");

  const stored = await everything() + h.log();
  assertNowhere(stored, { ...s, signature: "tokensig99", header: "eyJhbGciOiJIUzI1NiJ9" });
  for (const kept of [`${site}/cart/items`, `${site}/addresses#details`, "#/users/42/edit", "#/reset", "//files.example.com/x", "a.js:12:7 it fails",
    "icons.svg#user", `"#shape"`, `${site}/a.png 1x, ${site}/b.png 2x`]) assert.ok(stored.includes(kept), `${kept} is not stored`);
  const navigations = customs(events, "navigation").map(({ href }) => href.slice(site.length));
  assert.deepEqual(navigations, ["/addresses#details", "/addresses#/orders/7"]);
});

const source = readFileSync(new URL("../tracker-privacy.js", import.meta.url), "utf8");
const between = (from, to) => source.slice(source.indexOf(from), source.indexOf(to));

test("what is learned of a text is all of it, and of a long one no more than what is new", () => {
  const code = between("const stars", "// isDrawn") + between("// hear learns", "function finish");
  const { learn, hide, hear, tree } = new Function("CONTROLS", "localName", "record", `${code}; return { learn, hide, hear, tree };`)();
  learn("Somebody's words");
  assert.equal(hide("\u0130 SOMEBODY'S WORDS"), "\u0130 ********** *****");
  for (let n = 4; n < 200; n++) {
    const text = Array.from({ length: n }, (_, i) => String.fromCharCode(97 + (i * i * n + i) % 26)).join("");
    learn(text);
    assert.equal(hide(text), "*".repeat(n));
  }
  learn("\ud800".repeat(5)); // has no form in addresses
  assert.match(hide(`%${"25".repeat(9000)} somebody's%20words`), / \*{10} \*{5}$/); // decoded once
  const holder = {}, lines = Array.from({ length: 100 }, (_, i) => `Line ${i} has ${(i * 7919).toString(36)} and some more words, all its own`);
  const size = (node = tree) => [...node.values()].reduce((sum, child) => sum + size(child), 1);
  hear(holder, lines.join("\n"));
  const before = size();
  for (let n = 0; n < 100; n++) hear(holder, `${"x".repeat(n)}${lines.join("\n")}`);
  assert.ok(size() - before < 50_000, `${size() - before} nodes for 100 keys`);
  assert.doesNotMatch(hide(lines[50]), /\w/);
});

test("no element that may be secret in itself is passed by", async (t) => {
  const kinds = ["textarea", "div contenteditable", "p role='x TextBox'", "i role=combobox", "b class='a CodeMirror'", "b class='xterm y'",
    "s data-replay-mask", "u data-replay-block", "form role=searchbox", "em class=ql-editor"];
  for (const doctype of ["<!doctype html>", ""]) {
    pages["/telling"] = `${doctype}<meta charset=utf-8><body><p>open<b class=x title=role>open</b></p><form role=textbox><input name=attributes></form>
      ${kinds.map((kind) => `<${kind}></${kind.split(" ")[0]}>`).join("")}`;
    const page = await visit(t, `${site}/telling`);
    await page.addScriptTag({ path: fileURLToPath(new URL("../dist/rrweb-record.js", import.meta.url)) });
    const [matching, told] = await page.evaluate((source) => {
      document.body.append(document.createElementNS("http://www.w3.org/1999/xhtml", "x:textarea"));
      const { record } = window.rrwebRecord, all = [];
      const collect = (node) => { if (node.type === 2) all.push(node); node.childNodes?.forEach(collect); };
      record({ emit: ({ type, data }) => { if (type === 2 && !all.length) collect(data.node); }, slimDOMOptions: "all" })();
      const code = `${source}; return { EDITORS, isTelling };`;
      const { EDITORS, isTelling } = new Function("safe", "record", "options", code)((f) => f, record, {});
      const isSecret = ({ id }) => record.mirror.getNode(id).matches(`[data-replay-mask], [data-replay-block], ${EDITORS}, :root`);
      const isTold = ({ tagName, attributes }) => isTelling(tagName.replace("x:", ""), attributes);
      const names = (nodes) => nodes.map(({ id }) => record.mirror.getNode(id).cloneNode().outerHTML);
      return [names(all.filter(isSecret)), names(all.filter(isTold))];
    }, source);
    assert.ok(matching.length === kinds.length + 3, `${matching}`);
    assert.deepEqual(told, matching);
  }
});

test("labels of buttons are masked where the owner says so, and tell nothing that was typed", async (t) => {
  const secrets = { label: secretFor(), typed: secretFor() };
  const page = await visit(t, embed("/labels", `<div data-replay-mask><input type=submit value="${secrets.label}"></div>
    <input id=q><input type=button id=b value="Look up"><script>q.onchange = () => { b.value = "Look up " + q.value; };</script>`));
  const id = await established(page);
  await page.click("#q");
  await page.keyboard.type(secrets.typed);
  await page.keyboard.press("Enter");
  await mark(page, 1);
  await page.reload(); // the browser may keep the label
  await mark(page, 1);
  const stored = JSON.stringify(await arrived(page, id));
  assertNowhere(stored, secrets);
  assert.ok(stored.includes('"Look up'));
});

test("what remembering costs", async (t) => {
  const page = await visit(t, embed("/remembering", "<p>remembering", "data-autostart=false"));
  const cdp = await page.context().newCDPSession(page);
  await cdp.send("Performance.enable");
  const used = async () => (await cdp.send("Performance.getMetrics")).metrics.find(({ name }) => name === "ThreadTime").value * 1000;
  await page.evaluate((part) => {
    window.part = new Function("record", "localName", "CONTROLS", `${part}; return { learn, hide };`)();
    window.rows = Array.from({ length: 10_000 }, (_, i) => `Order number ${i} ${i % 10 ? "from here" : "of customer"} ${i * 7919} is on its way`);
  }, between("const stars", "// isDrawn"));
  async function median() { // of the processor's time: others may be busy
    const times = [];
    for (let i = 0; i < 21; i++) {
      const before = await used();
      await page.evaluate(() => { for (const row of window.rows) window.part.hide(row); });
      times.push(await used() - before);
    }
    return times.sort((a, b) => a - b)[10];
  }
  const without = await median();
  await page.evaluate(() => { for (let i = 0; i < 100; i++) window.part.learn(`Customer's words ${i * 7919}`); });
  const more = await median() - without;
  t.diagnostic(`10,000 texts, 100 strings remembered: ${more.toFixed(1)} ms more`);
  assert.ok(more < 100, `${more} ms`); // about 10, as seen
  assert.equal(await page.evaluate(() => window.part.hide("so: CUSTOMER'S words 7919!")), "so: ********** ***** ****!");
});
