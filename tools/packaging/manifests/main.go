// Command manifests builds kustomize directories, holds each object to the API's own types, where no field may be unknown and none of
// another kind, and prints all of them as JSON.
//
//	manifests DIR…
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

// kinds are those that the manifests may have.
var kinds = map[string]func() any{
	"v1 Namespace":                        func() any { return new(core.Namespace) },
	"v1 ConfigMap":                        func() any { return new(core.ConfigMap) },
	"apps/v1 DaemonSet":                   func() any { return new(apps.DaemonSet) },
	"monitoring.coreos.com/v1 PodMonitor": func() any { return new(monitoring.PodMonitor) },
}

func main() {
	out := map[string][]any{}
	var errs []error
	for _, dir := range os.Args[1:] {
		objects, err := build(dir)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", dir, err))
		}
		out[dir] = objects
	}
	err := errors.Join(append(errs, json.NewEncoder(os.Stdout).Encode(out))...)
	if err != nil {
		fmt.Fprintln(os.Stderr, "manifests:", err)
		os.Exit(1)
	}
}

// build is what a directory builds to.
func build(dir string) ([]any, error) {
	built, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		return nil, err
	}
	var objects []any
	for _, r := range built.Resources() {
		text, err := r.AsYAML()
		if err != nil {
			return nil, err
		}
		id := r.GetApiVersion() + " " + r.GetKind()
		fresh := kinds[id]
		if fresh == nil {
			return nil, fmt.Errorf("%s is not expected", id)
		}
		object := fresh()
		if err := yaml.UnmarshalStrict(text, object); err != nil {
			return nil, fmt.Errorf("%s %s: %w", id, r.GetName(), err)
		}
		objects = append(objects, object)
	}
	return objects, nil
}
