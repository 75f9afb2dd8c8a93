// Records testdata/demo.json anew: a visit to the demo shop, in real Chromium,
// as the server has stored it.
//
//   node web/test/record-demo.mjs
import { writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { harness, sleep, until } from "./harness.mjs";

const file = fileURLToPath(new URL("../../testdata/demo.json", import.meta.url));

// typing is as slow as a person's.
const type = (page, selector, text) => page.locator(selector).pressSequentially(text, { delay: 60 });

async function walkTo(page, selector) {
  const box = await page.locator(selector).boundingBox();
  await page.mouse.move(box.x + box.width / 2, box.y + box.height / 2, { steps: 25 });
  await sleep(200);
}

async function click(page, selector) {
  await page.locator(selector).scrollIntoViewIfNeeded();
  await walkTo(page, selector);
  await page.mouse.down();
  await page.mouse.up();
  await sleep(400);
}

async function shop(page) {
  for (const name of ["Sourdough bread", "Heather honey", "Pears, a bag"]) await click(page, `[aria-label="Add ${name}"]`);
  await click(page, '[aria-label="One more: Heather honey"]');
  await type(page, "#search", "coffee");
  await click(page, '[aria-label="Add Coffee, ground"]');
  await page.fill("#search", "");
  await type(page, "#account [name=name]", "Ann Example");
  await type(page, "#account [name=email]", "ann@example.com");
  await click(page, "#account [name=news]");
  await click(page, "#account button");
  await page.mouse.wheel(0, 500);
  await click(page, "#throw");
}

async function pay(page) {
  await click(page, "aside a.button");
  await page.waitForURL("**/demo/checkout");
  await type(page, "#pay [name=street]", "Long Street 1");
  await type(page, "#pay [name=town]", "Smalltown");
  await page.selectOption("#pay [name=delivery]", "post");
  await type(page, "#pay [name=remarks]", "Please ring twice.");
  await click(page, "#pay button");
}

const h = await harness();
try {
  const browser = await h.launch();
  const page = await browser.newPage({ viewport: { width: 1280, height: 800 } });
  await page.goto(`${h.url}/demo`);
  await page.waitForFunction(() => window.sessionReplay?.sessionId);
  const id = await page.evaluate(() => window.sessionReplay.sessionId);
  await shop(page);
  await pay(page);
  await page.evaluate(() => window.sessionReplay.stop());
  await until(async () => !(await h.json(`/sessions/${id}`)).isActive, "the session to end");
  const { events } = await h.json(`/sessions/${id}/events?limit=10000`);
  const text = `[${events.map((event) => JSON.stringify(event)).join(",\n")}]\n`;
  writeFileSync(file, text.replaceAll(h.url, "http://localhost:8080"));
  console.log(`${file}: ${events.length} events, ${Math.round(text.length / 1000)} KB`);
} finally {
  await h.close();
}
