"""A folder's index as a local web page: `python -m btok serve CHECKPOINT FOLDER`.

serve.py   the command: brings the index up to date and starts the server
app.py     what the page asks for: searches, thumbnails, files
shelf.py   an index and its folder's files: only what is indexed, and as it was then
index.html, style.css, page.js   the page itself; it loads nothing from elsewhere
"""
