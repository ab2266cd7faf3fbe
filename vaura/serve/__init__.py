"""A page to try models on: a silent video goes in, its sound comes out, beside the original.

shelf.py    which models there are, and those in memory
request.py  what one request asks for, and what may be asked
rooms.py    a folder for every request, and its end
line.py     who is next
work.py     the work: a request and a video in, steps and pieces and results out; no page needed
cards.py    results as HTML
desk.py     what the page and its endpoint answer
page.py     the page (Gradio), page.css, page.js
gradio_door.py  Gradio: opened, guarded, its looks
verb.py     the verb: python main.py config=configs/serve.yaml experiment_path=EXPERIMENT
"""
