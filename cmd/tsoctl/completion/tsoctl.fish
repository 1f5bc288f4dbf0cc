# fish completion for tsoctl: put it into /etc/fish/completions, or source it.
function __tsoctl_complete
    set -l typed (commandline -opc)
    set -e typed[1]
    set -l found (tsoctl __complete $typed (commandline -ct) 2>/dev/null)
    if test "$found" = ":files"
        __fish_complete_path (commandline -ct)
        return
    end
    for line in $found
        echo $line
    end
end
complete -c tsoctl -f -a '(__tsoctl_complete)'
