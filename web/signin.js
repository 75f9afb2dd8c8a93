// Signing in: the token goes to the server once and comes back as a cookie that
// no script can read.

const [form, token, note] = ['form', 'token', 'note'].map((id) => document.getElementById(id));

form.onsubmit = async (e) => {
  e.preventDefault();
  note.textContent = '';
  try {
    const headers = { 'Content-Type': 'application/json' }, body = JSON.stringify({ token: token.value });
    const response = await fetch('/signin', { method: 'POST', headers, body });
    if (response.ok) return location.reload();
    const isWrong = response.status === 401;
    token.ariaInvalid = isWrong;
    note.textContent = isWrong ? 'This is not the access token.' : `The server answered ${response.status}.`;
  } catch {
    note.textContent = 'The server cannot be reached.';
  }
  return token.select();
};
