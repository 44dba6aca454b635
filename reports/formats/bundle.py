"""One file to send: a zip with all that an issue needs."""

from __future__ import annotations

import io
import json
import zipfile

from crumplezone.errors import ReportError
from crumplezone.reports.formats import markdown, sarif, text
from crumplezone.reports.printable import printable
from crumplezone.reports.records import report as schema
from crumplezone.reports.records.report import Report

MAX_BYTES = 32 << 20
"""The most that the files of a bundle may have together, before compression."""

# The earliest time that a zip can hold: one report always gives the same bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)


def bundle(report: Report, script: str | None = None) -> bytes:
    """Zip a report: as JSON, as text, as Markdown for an issue, as SARIF, and the script if there is one.

    Args:
        report: Redact it first, if the zip is for strangers.
        script: A stand-alone Python file that shows the crash.

    Raises:
        ReportError: It would be larger than `MAX_BYTES`.
    """
    files = {
        "report.json": schema.encode(report),
        "report.txt": _encode(text.render(report)),
        "report.md": _encode(markdown.render(report, script)),
        "report.sarif.json": _encode(json.dumps(sarif.render([report]), indent=1) + "\n"),
    }
    if script is not None:
        files["reproduce.py"] = _encode(script)
    size = sum(map(len, files.values()))
    if size > MAX_BYTES:
        raise ReportError(
            f"the bundle of report {printable(report.id)} would have {size} bytes, more than {MAX_BYTES}: "
            "export it as Markdown or SARIF instead"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            member = zipfile.ZipInfo(name, _EPOCH)
            member.external_attr = 0o644 << 16  # Unix permissions; without them, unzip makes files of mode 0
            archive.writestr(member, data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _encode(shown: str) -> bytes:
    return shown.encode("utf-8", "backslashreplace")
