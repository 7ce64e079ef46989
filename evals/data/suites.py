"""The SHA-256 of every generated suite, so that a change to one is deliberate: it changes every score on that suite."""

from __future__ import annotations

# `fingerprint(load(Source(limit=200)))` at seed 0. A change of a suite also raises its task's version.
FINGERPRINTS: dict[str, str] = {
    "aime_synth": "2482c9cad1d076f820f302c247e9b3303818034c40547f8aa46ee12845111e73",
    "gsm_json_synth": "1f8093015586b3b4f895e66a74402b240c93c1c7233a9babd6c7c46203c1aeaa",
    "mcq_synth": "a994cb68936f0847f61bb1fa2183021cac0b0e827656144614f4e28bc5269ce5",
    "sandbox_json": "1acf38b3b8fa53a878fad42caac008d692d29fffa9b773099de4d3f7ac681ec0",
    "schema_synth": "e86c0b186acaeda1a27185bed4ecf8a811362757bcc67c539153d7088d7bbb32",
}
