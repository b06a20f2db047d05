"""The parts of an apt transaction: its arguments, its lists, what was interrupted, and words for what fails."""

from __future__ import annotations

from ..commands import last_lines, run
from ..files import explain
from . import apt_output
from .apt import source_texts

DPKG_SECONDS = 1800
# The kit's own holds are no reason to refuse; a simulation comes before they are taken off.
REMOVE = ["remove", "--allow-change-held-packages"]


def packages():
    """Return the installed packages with their versions, and the set of held packages.

    A package whose installation by dpkg was interrupted has the version None.
    """
    fields = "${Package} ${Version} ${db:Status-Status} ${db:Status-Want}\\n"
    found, held = {}, set()
    for line in run(["dpkg-query", "--show", "--showformat", fields]).out.splitlines():
        name, version, status, want = (line.split(" ") + ["", "", ""])[:4]
        if status == "installed":
            found[name] = version
        elif status not in ("config-files", "not-installed"):
            found[name] = None
        if want == "hold":
            held.add(name)
    return found, held


def wanted_version(params, name):
    """Return the version that a package of the module shall have, with * as in apt, or an empty string for any."""
    return params["versions"].get(name) or params["version"]


def words(params, names, removed):
    """Return the arguments of `apt-get install` for packages to install and to remove."""
    found = ["--no-install-recommends", "--allow-downgrades", "--allow-change-held-packages"]
    # Dependencies that the kit holds change with the packages; those that others hold are refused by _dragged.
    found += ["-o", "APT::Ignore-Hold=true"] if params["hold_also"] else []
    found += [name + ("=" + wanted_version(params, name) if wanted_version(params, name) else "") for name in names]
    return found + [name + "-" for name in removed]


def finish_dpkg(module, apt):
    """Complete what a killed run of apt or of the kit began. A package of somebody else that fails is a warning."""

    def attempt():
        # What looks interrupted may be the work of an apt that still runs, and be complete once that has ended.
        audit = run(["dpkg", "--audit"])
        if not audit.out.strip():
            return audit._replace(code=0)
        return run(["dpkg", "--force-confold", "--configure", "-a"], timeout=DPKG_SECONDS)

    answer = apt.when_free(attempt)
    if not answer.code:
        return
    broken = apt_output.broken_packages(answer.out + answer.err)
    if not broken or set(broken) & set(module.params["names"]):
        fail(module, "dpkg cannot finish what was begun.", answer, where="dpkg")
    module.warn(
        "dpkg was interrupted and cannot configure {}, which is not the kit's: `sudo dpkg --configure -a` on the host shows "
        "why".format(", ".join(broken))
    )


def install(module, apt, names, removed):
    """Install and remove packages. A package of somebody else that cannot be configured is a warning."""
    answer = apt.run(["install"] + words(module.params, names, removed))
    if not answer.code:
        return
    now, broken = packages()[0], apt_output.broken_packages(answer.out + answer.err)
    if broken and not set(broken) & set(module.params["names"]) and all(now.get(name) for name in names):
        module.warn(
            "The packages were installed, and dpkg cannot configure {}, which is not the kit's: `sudo dpkg --configure -a` "
            "on the host shows why".format(", ".join(broken))
        )
        return
    fail(module, "The packages cannot be installed.", answer, names)


def refresh(module, apt):
    """Read the lists of packages anew. A repository of somebody else that does not answer is a warning."""
    # `apt-get update` exits with 0 even if a mirror does not answer, so its output is checked.
    answer = apt.run(["-o", "Acquire::Retries=2", "update"])
    text, repository = answer.out + answer.err, module.params["repository"]
    found, texts = apt_output.problems(text), source_texts()
    if any(apt_output.belongs_to(problem.uri, repository) for problem in found):
        fail(module, "The package repository does not answer.", answer)
    if answer.code and not found:
        fail(module, "The package lists cannot be read.", answer, where="apt")
    for problem in found:
        files = ", ".join(apt_output.files_naming(problem.uri, texts)) or "no source file names it"
        module.warn(
            "A package source that is not the kit's does not answer: {} ({}): {}. The kit's packages do not come from "
            "it".format(problem.uri, files, problem.message)
        )


def fail(module, what, answer, names=(), where="", more="", step=""):
    """Fail the module with the last lines of apt. names: packages whose offered versions help. more: lines before them."""
    text = answer.out + answer.err
    offered = run(["apt-cache", "madison"] + list(names)).out.strip() if names else ""
    broken = [name for name in apt_output.broken_packages(text) if name not in module.params["names"]]
    found = apt_output.next_step(text, offered)
    if broken:
        found = "{} cannot be configured: `sudo dpkg --configure -a` on the host shows why".format(", ".join(broken))
    lines = last_lines(answer, 6)
    module.fail_json(
        msg=explain(
            what,
            where=where or module.params["repository"] or "apt",
            expected=" ".join(names),
            found=more + "\n" + lines if more else lines,
            next_step=step or found,
        )
    )
