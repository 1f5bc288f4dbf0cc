#compdef tsoctl
# zsh completion for tsoctl: put it into a directory of $fpath as _tsoctl, or source it after compinit.
_tsoctl() {
	local -a found
	local line
	for line in "${(@f)$(tsoctl __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
		if [[ $line == ":files" ]]; then
			_files
			return
		fi
		[[ -z $line ]] && continue
		if [[ $line == *$'\t'* ]]; then
			found+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
		else
			found+=("${line//:/\\:}")
		fi
	done
	_describe tsoctl found
}
if [[ ${funcstack[1]} == _tsoctl ]]; then
	_tsoctl "$@"
else
	compdef _tsoctl tsoctl
fi
