"""The workbench: the library in a browser, on this machine (`underhood serve`).

Two ways to build it were sketched.

- *A request is the work.* Each page has a route that runs a method and streams the answer. Little
  code; but closing a page kills the work, two tabs wait on each other's connections, and a reload
  has nothing to come back to.
- *A request makes a job.* One route takes all work, `POST /api/jobs {"do": ...}`. A job waits in a
  queue, runs in the one thread that touches the model, tells of itself in numbered events, and
  leaves a file that `Result.load` opens. Pages only ask and draw.

The second is built, because it has one shape for everything that takes time, and nothing is lost
when a page goes away:

    page ── POST /api/jobs ──> Job ──> Worker (one thread: the models) ──> Shelf (results folder)
      └─── GET /api/jobs/ID/events <── numbered events (SSE; goes on after Last-Event-ID)

- `jobs.py`: a job, its events, its end, and the worker.
- `models.py`: which models there are, what each is and offers; a model is loaded by a job.
- `desk.py`: what a server holds, and the table of what a job can do; `looking.py`, `changing.py`
  and `editing.py` do it. A request is a pydantic class (`asking.py`): what does not fit is refused
  before it waits.
- `palette.py`, `forms.py`: ops and methods as forms, read from the code's own signatures.
- `shelf.py`: results, explanations and plans by id.
- `guard.py`: who may ask, and what a browser may do with the answer; `app.py`: the routes;
  `server.py`: socket, address, uvicorn.
- `static/`: the pages, plain ES modules, served as they are.

It is a surface: it parses, calls and shows. Whatever it finds, Python can find with the same call,
which every panel carries. The web layer never runs a model, and only one job runs at a time, so a
long one keeps others waiting; they show their place in the queue and can be cancelled.

`docs/workbench.md` lists the routes and says what protects them.
"""
