"""The server: bundles over HTTP, by the KServe v2 inference protocol and a plain route, with a page. Extra `serve`.

One request, in order: `front` (who may ask, how many at once), `routes`, `body` (read within limits), `v2` or `plain`
(what was asked), `service.estimate` (the estimator's queue), and the same module writes the answer.
"""
